"""Raise errors where LiteRT has no fused op for a layer."""


def check(layer, sequences, initial_state, mask, training):
    """Raise a `ValueError` unless the fused LSTM op can compute this call of a layer.

    Args:
        layer: A `ScratchLSTM`.
        sequences: Tensor of shape `(batch, time, features)`.
        initial_state: List `[h, c]`.
        mask: Boolean tensor or `None`.
        training: Boolean, whether dropout is applied.
    """
    # Imports TensorFlow, which other backends do not need.
    from keras_scratch_lstm.recurrence.litert import are_zeros

    dtype, shape = layer.compute_dtype, tuple(sequences.shape)
    drops_h = training and layer.cell.recurrent_dropout
    obstacles = {
        "custom gates or other activations": not layer.cell.is_standard,
        f"compute_dtype={dtype!r}": dtype != "float32",
        "return_state=True": layer.return_state,
        "stateful=True (the op keeps its states without it)": layer.stateful,
        "recurrent dropout, called with training=True": drops_h,
        f"the unknown dimensions of its input, {shape}": None in shape,
        "a mask": mask is not None,
        "initial states": not are_zeros(initial_state),
    }
    for reason in filter(obstacles.get, obstacles):
        raise ValueError(
            "LiteRT's fused LSTM op requires a standard cell in float32, fixed shapes, "
            f"no mask, and unused states. Received: `{layer.name}` with {reason}. Set "
            "`unroll=True` for unrolled ops, or write a loop with "
            "`model.export(path, format='litert')`."
        )
