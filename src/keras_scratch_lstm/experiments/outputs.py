"""Outputs of experiments and their losses, with masks as in `fit`."""

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm.observing.call import map_with_masks


class _FunctionLoss(keras.losses.Loss):
    """The mean of a function `(y_true, y_pred)`, as `compile` makes of it."""

    def __init__(self, function, dtype):
        super().__init__(name="loss", dtype=dtype)
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(y_true, y_pred)


def loss_function(loss, model):
    """Return a function `(y_true, y_pred)` with a scalar result.

    Args:
        loss: A loss by name, a function, a Keras loss or a metric; `None` is the
            compiled loss of the model.
        model: The model.
    """
    if loss is None:
        compiled = _keras.compiled_loss(model)
        if compiled is None:
            raise ValueError(
                f"`loss` must be given, since {model.name!r} is not compiled. "
                "Received: loss=None"
            )
        return compiled
    if isinstance(loss, keras.metrics.Metric):
        return lambda y_true, y_pred: _measure(loss, y_true, y_pred)
    try:
        loss = keras.losses.get(loss)
    except ValueError:
        rule = "the name of a Keras loss, or a function `(y_true, y_pred)`"
        raise _validation.invalid("loss", loss, rule) from None

    def compute(y_true, y_pred):
        function = loss
        if not isinstance(loss, keras.losses.Loss):
            dtypes = {_validation.dtype_of(y) for y in keras.tree.flatten(y_pred)}
            dtype = "float64" if "float64" in dtypes else None
            function = _FunctionLoss(loss, dtype)
        return ops.mean(function(y_true, y_pred))

    return compute


def _measure(metric, y_true, y_pred):
    metric.reset_state()
    return metric(y_true, y_pred)


def pick(outputs, target, names=()):
    """Return the values of a target, of shape `(batch,)`, or `(batch, n)` for several.

    Args:
        outputs: Nested outputs of a model.
        target: See `attribute`.
        names: Sequence of strings, the names of the outputs.
    """
    if callable(target):
        values = target(outputs)
        if len(getattr(values, "shape", ())) not in (1, 2):
            rule = "a function that returns a tensor of shape (batch,) or (batch, n)"
            raise _validation.invalid("target", target, rule)
        return values
    flat = keras.tree.flatten(outputs)
    names = sorted(outputs) if isinstance(outputs, dict) else list(names)
    index = target if isinstance(target, tuple) else (target,)
    name = index[0] if index and isinstance(index[0], str) else None
    if name in names and len(names) == len(flat):
        flat, index = [flat[names.index(name)]], index[1:]
        if len(index) == 1 and isinstance(index[0], tuple):
            (index,) = index
    shape = tuple(flat[0].shape[1:])
    if name is not None and not index:  # all values of this output
        index = tuple(0 if size == 1 else slice(None) for size in shape)
    if len(flat) > 1:
        rule = f"a name of {str(names)[1:-1]}, (name, index), or a function of these"
        raise _validation.invalid("target", target, rule)
    if not _is_index(index, shape):
        rule = f"an index or a slice of one sample's output, of shape {shape}"
        raise _validation.invalid("target", target, rule)
    return flat[0][(slice(None), *index)]


def _is_index(index, shape):
    """Whether it selects one value, or those of one axis."""
    if len(index) != len(shape) or sum(isinstance(k, slice) for k in index) > 1:
        return False
    for k, size in zip(index, shape, strict=True):
        if isinstance(k, slice):
            _validation.select("target", k, size)
        else:
            is_integer = isinstance(k, (int, np.integer)) and not isinstance(k, bool)
            if not is_integer or not -size <= k < size:
                return False
    return True


def to_targets(targets):
    """Return the targets of a model as tensors."""
    if targets is None:
        rule = "arrays, or part of a dataset of `(inputs, targets)`"
        raise _validation.invalid("targets", targets, rule)
    return keras.tree.map_structure(ops.convert_to_tensor, targets)


def concatenate(outputs):
    """Concatenate nested outputs of several batches, and their masks."""
    if len(outputs) == 1:
        return outputs[0]
    shapes = {tuple(y.shape[1:]) for y in keras.tree.flatten(outputs)}
    if len(shapes) > len(keras.tree.flatten(outputs[0])):
        raise ValueError(
            "`inputs` must be batches whose outputs have the same length. Received "
            f"outputs of shapes {sorted(shapes)}, without their samples. Run one batch "
            "at a time."
        )
    return map_with_masks(lambda *parts: ops.concatenate(parts), *outputs)
