"""Raise errors where LiteRT has no fused op for a layer."""

import warnings

from keras_scratch_lstm import recurrence


def check(layer, sequences, initial_state, mask, training):
    """Check that a layer can be exported as the fused LSTM op of LiteRT.

    Args:
        layer: A `ScratchLSTM`.
        sequences: Tensor of shape `(batch, time, features)`.
        initial_state: List `[h, c]`.
        mask: Boolean tensor or `None`.
        training: Boolean, whether dropout is applied.

    Raises:
        ValueError: If the layer or these arguments need other ops.
    """
    # Imports TensorFlow, which other backends do not need.
    from keras_scratch_lstm.recurrence import litert

    reason = _obstacle(layer, training) or litert.obstacle(
        sequences, *initial_state, mask
    )
    if reason:
        raise ValueError(
            "LiteRT's fused LSTM op requires a standard cell in float32, a fixed batch "
            "size and number of time steps, no mask, and unused states. Received: "
            f"`{layer.name}` with {reason}. {_remedy(reason)}"
        )
    if recurrence.forced() is None:
        warnings.warn(
            "LiteRT's fused LSTM op keeps its states between invocations. Call "
            "`interpreter.reset_all_variables()` before each new sequence. It also "
            "clips the cell state to [-10, 10], unless you pass the file to "
            "`keras_scratch_lstm.recurrence.litert.remove_limits`. To hide this "
            "warning, export within `keras_scratch_lstm.recurrence.force('litert')`.",
            stacklevel=2,
        )


def _obstacle(layer, training):
    if not layer.cell.is_standard:
        return "custom gates or other activations"
    if layer.compute_dtype != "float32":
        return f"compute_dtype={layer.compute_dtype!r}"
    for name in ("return_state", "stateful"):
        if getattr(layer, name):
            return f"{name}=True"
    if training and layer.cell.recurrent_dropout:
        return "recurrent dropout, called with training=True"
    return None


def _remedy(reason):
    if "dimensions" in reason:
        return (
            "Pass a fixed shape to `export`, such as `input_signature="
            "[keras.InputSpec(shape=(1, 20, 8), dtype='float32')]`."
        )
    if "dtype" in reason:
        return "Copy the weights to a model with the dtype policy 'float32'."
    return (
        "Export within `keras_scratch_lstm.recurrence.force('loop')` for a loop, or "
        "set `unroll=True`."
    )
