"""The recurrence that LiteRT's converter replaces by its fused LSTM op.

The converter recognizes a function of the graph by the attribute `api_implements`, its
six arguments and its five results, and discards the body. The states are constants,
which the op overwrites. With computed states it would start from them, but in int8
files the converter gives a computed cell state 8 of the 16 bits that the op reads.
"""

import uuid
from os import PathLike

import numpy as np
import tensorflow as tf

from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES, fuse
from keras_scratch_lstm.recurrence import tensorflow

_CELL_STATE = 19  # index among the inputs of the fused op


def lstm(x, h, c, W_x, W_h, b, mask, training):
    if b is None:
        b = [tf.zeros_like(W[0]) for W in W_x]
    function = tf.function(
        _body,
        autograph=False,
        experimental_attributes={
            "api_implements": f"lstm_{uuid.uuid4()}",
            "time_major": True,
            "go_backwards": False,
        },
    )
    _, h_all, h, c, _ = function(x, h, c, fuse(W_x), fuse(W_h), fuse(b))
    return h_all, h, c


def obstacle(x, h, c, mask):
    """What prevents the fused op, in words, or `None`.

    Args:
        x: Input sequence, the first two axes in any order.
        h: Initial hidden state.
        c: Initial cell state.
        mask: Mask or `None`.
    """
    if None in x.shape:
        return f"the unknown dimensions of its input, {tuple(x.shape)}"
    if mask is not None:
        return "a mask"
    # States that the layer creates are constants of the graph.
    values = [tf.get_static_value(state) for state in (h, c)]
    if any(value is None or value.any() for value in values):
        return "initial states"
    return None


def remove_limits(path: str | PathLike[str]) -> None:
    """Remove two limits of the cell state from the LSTM ops of a LiteRT file.

    TensorFlow's converter makes the ops clip the cell state to [-10, 10]. It also
    quantizes a cell state below 0.5 to a range for which int8 ops return wrong outputs.

    Args:
        path: Path of a `.tflite` file, which is overwritten.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model(str(path))
    for graph in file.subgraphs:
        for op in graph.operators:
            name = flatbuffer_utils.opcode_to_name(file, op.opcodeIndex)
            if name != "UNIDIRECTIONAL_SEQUENCE_LSTM":
                continue
            op.builtinOptions.cellClip = 0.0
            quantization = graph.tensors[op.inputs[_CELL_STATE]].quantization
            if quantization is not None and quantization.scale is not None:
                # 16 bits for [-1, 1]: the op's `tanh` supports no smaller range.
                quantization.scale = np.maximum(quantization.scale, 2.0**-15)
    flatbuffer_utils.write_model(file, str(path))


def _body(x, h, c, kernel, recurrent_kernel, bias):
    """What runs where TensorFlow executes the function itself."""
    weights = []
    for fused in (kernel, recurrent_kernel, bias):
        of_gate = dict(zip(FUSED_ORDER, tf.split(fused, 4, -1), strict=True))
        weights.append([of_gate[gate] for gate in GATES])
    h_all, h, c = tensorflow.lstm(x, h, c, *weights, None, False)
    return h_all[-1], h_all, h, c, tf.constant(0.0)  # the last one: Keras 2's "runtime"
