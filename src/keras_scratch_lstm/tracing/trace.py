"""`GateTrace` and `Gradients`: arrays of an LSTM at every time step."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from keras_scratch_lstm import _types, _validation
from keras_scratch_lstm.observing.loop import ARRAYS
from keras_scratch_lstm.tracing import files, html
from keras_scratch_lstm.tracing.correlation import correlations
from keras_scratch_lstm.tracing.tokens import tokens_per_sample

if TYPE_CHECKING:
    import pandas

SATURATED = 0.1, 0.9  # below, above


def check_array(array):
    """Return the name of an array, or raise an error if there is none of this name."""
    if array not in ARRAYS:
        raise _validation.invalid("array", array, f"one of {str(ARRAYS)[1:-1]}")
    return array


def import_optional(name, method):
    """Import a package that only one method needs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"`{method}` needs {name}: run `pip install {name}`."
        ) from None


class Saturation(NamedTuple):
    """Fractions of time steps, each `(units,)`, at which a gate is saturated."""

    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Arrays:
    """Six arrays of an LSTM at every time step, checked; see `GateTrace`."""

    i: np.ndarray
    f: np.ndarray
    o: np.ndarray
    c_tilde: np.ndarray
    c: np.ndarray
    h: np.ndarray
    mask: np.ndarray | None = None
    layer: str = ""
    backward: Self | None = None

    def __post_init__(self) -> None:
        shape = getattr(self.i, "shape", ())
        for name in ARRAYS:
            array = getattr(self, name)
            if not (
                isinstance(array, np.ndarray)
                and array.dtype in ("float32", "float64")
                and array.ndim == 3
                and array.shape == shape
            ):
                rule = "float32 or float64, of shape (batch, time, units) as all six"
                raise _validation.invalid(name, array, rule)
        if self.mask is not None and not (
            isinstance(self.mask, np.ndarray)
            and self.mask.dtype == bool
            and self.mask.shape == shape[:2]
        ):
            rule = f"a boolean array of shape {shape[:2]}, or None"
            raise _validation.invalid("mask", self.mask, rule)
        if not isinstance(self.layer, str):
            raise _validation.invalid("layer", self.layer, "a string")
        kind = type(self)
        is_same = isinstance(self.backward, kind) and not self.backward.backward
        if self.backward is not None and not is_same:
            rule = f"a `{kind.__name__}` without `backward`, or None"
            raise _validation.invalid("backward", self.backward, rule)

    def to_dataframe(self, tokens: _types.Tokens | None = None) -> "pandas.DataFrame":
        """Convert the arrays to a pandas `DataFrame` with one row per value.

        Args:
            tokens: One sample's tokens (a string or a list of `time` strings), or a
                list of all samples' tokens. Default: `None`.

        Returns:
            `DataFrame` with the columns `sample`, `step`, `token`, `unit`, `gate`
            (one of `i`, `f`, `o`, `c_tilde`, `c` and `h`) and `value`. Without
            `tokens`, the column `token` is empty.

        Raises:
            ImportError: If pandas is not installed.
            ValueError: If `tokens` is invalid.
        """
        pd = import_optional("pandas", "to_dataframe")
        batch, time, units = self.i.shape
        shape = batch, time, units, len(ARRAYS)
        sample, step, unit, gate = np.indices(shape, dtype="int32", sparse=True)

        def column(index):
            return np.broadcast_to(index, shape).ravel()

        categories: Any = []
        codes = np.full((batch, time, 1, 1), -1)
        if tokens is not None:
            per_sample = np.array(tokens_per_sample(tokens, batch, time))
            categories, codes = np.unique(per_sample, return_inverse=True)
            codes = codes.reshape(-1, time, 1, 1)
        return pd.DataFrame(
            {
                "sample": column(sample),
                "step": column(step),
                "token": pd.Categorical.from_codes(
                    column(codes), categories=pd.Index(categories, dtype="str")
                ),
                "unit": column(unit),
                "gate": pd.Categorical.from_codes(column(gate), categories=ARRAYS),
                "value": np.stack([getattr(self, name) for name in ARRAYS], -1).ravel(),
            }
        )

    def save(self, path: _types.Path) -> None:
        """Save the arrays to an `.npz` file, atomically if it is a regular file.

        Args:
            path: String or path-like, the file to write. `np.load` reads it, too.

        Raises:
            OSError: If the file cannot be written.
        """
        files.save_arrays(path, type(self).__name__, self._to_arrays(""))

    @classmethod
    def load(cls, path: _types.Path) -> Self:
        """Load what `save` wrote. No code in the file is executed.

        Args:
            path: String or path-like, the file to read.

        Returns:
            An instance of this class.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If the file is damaged or was not written by `save`.
        """
        return files.load_arrays(
            path, cls.__name__, lambda arrays: cls._from_arrays(arrays, "")
        )

    def __repr__(self) -> str:
        batch, time, units = self.i.shape
        return (
            f"{type(self).__name__}(layer={self.layer!r}, batch={batch}, time={time}, "
            f"units={units}{', masked' if self.mask is not None else ''}"
            f"{', backward=…' if self.backward is not None else ''})"
        )

    def _arrays(self):
        return {name: getattr(self, name) for name in ARRAYS}

    def _unmasked(self):
        return np.ones(self.i.shape[:2], bool) if self.mask is None else self.mask

    def _to_arrays(self, prefix):
        arrays = {prefix + name: values for name, values in self._arrays().items()}
        arrays[prefix + "layer"] = np.array(self.layer)
        if self.mask is not None:
            arrays[prefix + "mask"] = self.mask
        if self.backward is not None:
            arrays |= self.backward._to_arrays("backward_")
        return arrays

    @classmethod
    def _from_arrays(cls, content, prefix):
        arrays = {name: content[prefix + name] for name in ARRAYS}
        mask = content.get(prefix + "mask")
        backward = None
        if not prefix and "backward_i" in content:
            backward = cls._from_arrays(content, "backward_")
        layer = content[prefix + "layer"].item()
        return cls(**arrays, mask=mask, layer=layer, backward=backward)


@dataclass(frozen=True, eq=False, repr=False)
class GateTrace(Arrays):
    """The gates and states of an LSTM layer at every time step.

    `trace_gates` returns it. The names are those of the equations in
    `ScratchLSTMCell`. Time steps are in the order of the inputs, also for a layer
    that reads them backwards. At masked time steps, all six arrays are NaN.

    Attributes:
        i: Array of shape `(batch, time, units)`, the input gate. Its dtype is
            float32, or float64 for a layer that computes in float64.
        f: Array of the same shape and dtype, the forget gate.
        o: Array of the same shape and dtype, the output gate.
        c_tilde: Array of the same shape and dtype, the candidate cell state.
        c: Array of the same shape and dtype, the cell state.
        h: Array of the same shape and dtype, the hidden state.
        mask: Boolean array of shape `(batch, time)`, `False` where a time step is
            masked, or `None` if there is no mask.
        layer: String, the name of the layer.
        backward: The `GateTrace` of the backward layer if a `Bidirectional` layer
            was traced, else `None`.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import GateTrace, trace_gates
    >>> layer = keras.layers.LSTM(4, name="lstm")
    >>> x = np.ones((2, 3, 5), "float32")
    >>> h = layer(x)
    >>> trace = trace_gates(layer, x)
    >>> trace
    GateTrace(layer='lstm', batch=2, time=3, units=4)
    >>> np.allclose(trace.h, trace.o * np.tanh(trace.c))
    True
    >>> trace.saturation()["f"].right.shape
    (4,)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trace.save(f"{folder}/trace.npz")
    ...     loaded = GateTrace.load(f"{folder}/trace.npz")
    >>> np.array_equal(loaded.f, trace.f)
    True
    """

    def saturation(self) -> dict[str, Saturation]:
        """Compute how often each gate of each unit is nearly closed or nearly open.

        These are the left- and right-saturated fractions of Karpathy, Johnson and
        Li: the fractions of unmasked time steps at which a gate is below 0.1, and
        above 0.9.

        Returns:
            Dict with the keys `"i"`, `"f"` and `"o"`. Each value is a
            `Saturation(left, right)` of two arrays of shape `(units,)`.

        References:

        - [Karpathy, Johnson and Li, 2015](https://arxiv.org/abs/1506.02078)
        """
        low, high = SATURATED
        steps = np.count_nonzero(self._unmasked())

        def fraction(condition):
            count = np.count_nonzero(condition, axis=(0, 1))
            return count / steps if steps else np.full(count.shape, np.nan)

        return {
            gate: Saturation(fraction(values < low), fraction(values > high))
            for gate, values in (("i", self.i), ("f", self.f), ("o", self.o))
        }

    def correlate(
        self, features: Mapping[str, Any], array: str = "c"
    ) -> dict[str, np.ndarray]:
        """Correlate features of the time steps with the values of every unit.

        Args:
            features: Dict of feature name -> array of shape `(time,)` or
                `(batch, time)`, of booleans or numbers; NaN where missing.
            array: String, the gate or state to correlate with. Default: `"c"`.

        Returns:
            Dict of feature name -> float64 array of shape `(units,)`: the Pearson
            correlation over all unmasked time steps at which the feature is not NaN;
            NaN where the feature or the unit is constant.
        """
        values = getattr(self, check_array(array))
        return correlations(values, self._unmasked(), features)

    def to_html(
        self,
        path: _types.Path,
        tokens: _types.Tokens | None = None,
        *,
        sample: int = 0,
        inputs: Any = None,
        feature_names: Sequence[str] | None = None,
        times: Any = None,
        scores: Any = None,
    ) -> None:
        """Write an HTML report of the gates and states.

        The report is one file that needs no network. It colors the tokens by one
        unit's values, or plots the input series above the gates and states of that
        unit. It sorts the units by variance or by their correlation with features of
        the tokens or inputs, and finds spans of time steps at which the same units
        are active. Values are quantized, to 254 levels or fewer per unit and sample,
        so that 2,000 tokens of 256 units take less than 3 MB.

        Args:
            path: String or path-like, the file to write.
            tokens: One sample's tokens (a string or a list of `time` strings), or a
                list of all samples' tokens. Default: `None`, which shows the
                numbers of the time steps.
            sample: Integer, the sample that the report opens with. Default: `0`.
            inputs: Array of shape `(batch, time, features)` or `(batch, time)`, the
                series to plot; NaN where missing. Default: `None`.
            feature_names: List of strings, the names of the features.
            times: Array of dates, numbers or strings of shape `(time,)` or
                `(batch, time)`, the labels of the time steps. Default: `None`.
            scores: Array of the shape of `inputs`, the attribution scores, such as
                those of `attribute`. Default: `None`.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If an argument is invalid.
        """
        batch, time, _ = self.i.shape
        sample = _validation.integer("sample", sample, 0, batch - 1)
        if tokens is not None:
            tokens = tokens_per_sample(tokens, batch, time)
        series = html.read_series((batch, time), inputs, feature_names, times, scores)
        page = html.render(
            self.layer, self._arrays(), sample, tokens, series, self.correlate
        ).encode()
        files.write_file(path, lambda file: file.write(page))

    def _repr_html_(self) -> str:
        saturation = self.saturation()
        return html.render_for_notebook(
            self.layer, self._arrays(), self.mask, saturation
        )


@dataclass(frozen=True, eq=False, repr=False)
class Gradients(Arrays):
    """The gradients of a loss by the gates and states at every time step.

    `trace_gradients` returns it. `gradients.c[:, t]` is dL/dc_t. The attributes, which
    are arrays of shape `(batch, time, units)`, and the methods `to_dataframe`, `save`
    and `load` are those of `GateTrace`. They are NaN at masked time steps, and for an
    array that the layer does not have.
    """


def join(batches, lstms, kind):
    """Join the arrays of several batches, padded to the same length.

    Args:
        batches: List of dicts: layer -> array name or `"mask"` -> array.
        lstms: List of one layer, or the two of a `Bidirectional` layer.
        kind: `GateTrace` or `Gradients`.
    """
    result: Any = None
    for lstm in reversed(lstms):
        arrays = _join([batch[lstm] for batch in batches])
        result = kind(**arrays, layer=lstm.name, backward=result)
    return result


def _join(parts):
    time = max(part["h"].shape[1] for part in parts)
    if any("mask" in part or part["h"].shape[1] < time for part in parts):
        for part in parts:
            part.setdefault("mask", np.ones(part["h"].shape[:2], bool))

    def pad(values):
        width = [(0, 0), (0, time - values.shape[1]), (0, 0)][: values.ndim]
        fill = False if values.dtype == bool else np.nan
        return np.pad(values, width, constant_values=fill) if width[1][1] else values

    joined = {}
    for name in list(parts[0]):
        # Releasing each part keeps the peak memory near the size of the result.
        values = [pad(part.pop(name)) for part in parts]
        joined[name] = values[0] if len(values) == 1 else np.concatenate(values)
    return joined
