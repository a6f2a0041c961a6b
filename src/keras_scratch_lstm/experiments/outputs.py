"""Outputs of experiments and their losses, with masks as in `fit`."""

import keras
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
