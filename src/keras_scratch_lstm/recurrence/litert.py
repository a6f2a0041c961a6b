"""The recurrence that LiteRT's converter replaces with its fused LSTM op.

The converter recognizes a function of the graph by the attribute `api_implements`, its
six arguments and its five results, and discards the body. The states are constants,
which the op overwrites. With computed states it would start from them, but in int8
files the converter gives a computed cell state 8 of the 16 bits that the op reads.
"""

import uuid

import tensorflow as tf

from keras_scratch_lstm.per_gate import fuse


def lstm(x, h, c, W_x, W_h, b, mask, training):
    if b is None:
        b = [tf.zeros_like(W[0]) for W in W_x]
    function = tf.function(
        _discarded,
        autograph=False,
        experimental_attributes={
            "api_implements": f"lstm_{uuid.uuid4()}",
            "time_major": True,
            "go_backwards": False,
        },
    )
    _, h_all, h, c, _ = function(x, h, c, fuse(W_x), fuse(W_h), fuse(b))
    return h_all, h, c


def _discarded(x, h, c, kernel, recurrent_kernel, bias):
    """Results of the right shapes; the last one is the "runtime" of Keras 2."""
    h_all = tf.zeros((*x.shape[:2], h.shape[-1]))
    return h, h_all, h, c, tf.constant(0.0)


def are_zeros(states):
    """Whether states are constants of the graph, as those that a layer creates."""
    values = [tf.get_static_value(state) for state in states]
    return all(value is not None and not value.any() for value in values)
