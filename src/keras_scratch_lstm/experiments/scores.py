"""`Attribution`: scores by sample, time step and feature, and their tables."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_scratch_lstm.tracing.trace import import_optional

if TYPE_CHECKING:
    import pandas
    import shap


@dataclass(frozen=True, eq=False)
class Attribution:
    """The result of `attribute`.

    With several targets, all arrays except `inputs` have one more axis at the end.

    Attributes:
        scores: Array of the shape of the inputs, `(batch, time, features)`, or
            `(batch, features)` for static ones. Dict of input name -> array if scores
            of several inputs were computed.
        difference: Array of shape `(batch,)`, the output minus that of the baseline.
        error: Array of shape `(batch,)`, the absolute difference between the sum of
            the scores and `difference`.
        n_steps: Array of integers of shape `(batch,)`, the points of each path; 0 for
            occlusion.
        output: Array of shape `(batch,)`, the output of the model.
        inputs: The values that have the scores; an array or dict as `scores`.
        feature_names: List of strings, or dict of input name -> list, or `None`.
    """

    scores: Any
    difference: np.ndarray
    error: np.ndarray
    n_steps: np.ndarray
    output: np.ndarray
    inputs: Any
    feature_names: Any = None

    def by_feature(self) -> Any:
        """Return the mean over the samples of `|sum over time|`: `(features,)`."""
        return self._means(lambda x, axis: x.sum(axis=tuple(range(1, axis))))

    def by_step(self) -> Any:
        """Return the mean over the samples of `|sum over features|`: `(time,)`.

        Static inputs have none.
        """
        return self._means(lambda x, axis: x.sum(axis=axis) if axis > 1 else None)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Convert the scores to a pandas `DataFrame` with one row per score.

        Returns:
            `DataFrame` with the columns `sample`, `step`, `feature` and `score`; also
            `input` for several inputs, and `target` for several targets. Static
            inputs have no `step`.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd, tables = import_optional("pandas", "to_dataframe"), []
        for name, scores, _, features, axis in self._parts():
            index = np.indices(scores.shape, sparse=True)
            columns = {} if name is None else {"input": np.array(name)}
            columns["sample"] = index[0]
            columns |= {"step": index[1]} if axis == 2 else {}
            columns["feature"] = np.array(features)[index[axis]]
            columns |= {"target": index[-1]} if axis < scores.ndim - 1 else {}
            columns["score"] = scores
            for key, value in columns.items():
                columns[key] = np.broadcast_to(value, scores.shape).ravel()
            tables.append(pd.DataFrame(columns))
        return tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)

    def to_shap(self) -> "shap.Explanation":
        """Convert the scores to a `shap.Explanation`, for the plots of SHAP.

        Returns:
            `shap.Explanation` with one column per time step and feature, such as
            `"humidity[47]"`.

        Raises:
            ImportError: If shap is not installed.
        """
        shap, columns, names = import_optional("shap", "to_shap"), [], []
        for _, scores, inputs, features, axis in self._parts():
            shape = len(scores), inputs[0].size, *scores.shape[axis + 1 :]
            columns.append((scores.reshape(shape), inputs.reshape(shape[:2])))
            for step in np.ndindex(inputs.shape[1:-1]):
                place = str(list(step)) if step else ""
                names += [f"{feature}{place}" for feature in features]
        values, data = (np.concatenate(x, axis=1) for x in zip(*columns, strict=True))
        base = self.output - self.difference
        return shap.Explanation(values, base, data=data, feature_names=names)

    def _means(self, function):
        found = {}
        for name, scores, *_, axis in self._parts():
            values = function(scores, axis)
            if values is not None:
                found[name] = np.abs(values).mean(axis=0)
        return found.get(None, found)

    def _parts(self):
        """Yield the name of each input, or `None`, and what belongs to it."""
        is_one = not isinstance(self.scores, dict)
        for name in [None] if is_one else self.scores:
            scores, inputs, names = (
                one if is_one or one is None else one.get(name)
                for one in (self.scores, self.inputs, self.feature_names)
            )
            axis = inputs.ndim - 1  # of the features
            prefix = "feature" if is_one else name
            names = names or [f"{prefix} {k}" for k in range(inputs.shape[axis])]
            yield name, scores, inputs, names, axis
