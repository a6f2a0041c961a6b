"""Layers and models for all tests, and how to compare what they return."""

import keras
import numpy as np
import pytest
from custom_cells import PeepholeCell
from keras import ops
from reference import ARRAYS, run_lstm, weights_of

from keras_scratch_lstm import (
    CoupledLSTMCell,
    DropConnectLSTMCell,
    LayerNormLSTMCell,
    PeepholeLSTMCell,
    ScratchLSTM,
    ScratchLSTMCell,
    ZoneoutLSTMCell,
    trace_gates,
)

BATCH, TIME, FEATURES, UNITS = 5, 7, 3, 4


def rnn(cell_class):
    return lambda **kwargs: keras.layers.RNN(cell_class(UNITS), **kwargs)


def scratch(cell_class):
    return lambda **kwargs: ScratchLSTM(cell=cell_class(UNITS), **kwargs)


LAYERS = {
    "LSTM": lambda **kwargs: keras.layers.LSTM(UNITS, **kwargs),
    "RNN(LSTMCell)": rnn(keras.layers.LSTMCell),
    "RNN(ScratchLSTMCell)": rnn(ScratchLSTMCell),
    "ScratchLSTM": lambda **kwargs: ScratchLSTM(UNITS, **kwargs),
    "custom cell": scratch(PeepholeCell),
}
VARIANTS = {
    "peephole": scratch(PeepholeLSTMCell),
    "coupled": scratch(CoupledLSTMCell),
    "layer norm": scratch(LayerNormLSTMCell),
    "zoneout": scratch(ZoneoutLSTMCell),
    "DropConnect": scratch(DropConnectLSTMCell),
}


def make(kind, **kwargs):
    keras.utils.set_random_seed(1)
    layer = (LAYERS | VARIANTS)[kind](**kwargs)
    layer.build((BATCH, TIME, FEATURES))
    rng = np.random.default_rng(1)
    for weight in layer.weights if kind in VARIANTS else ():
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return layer


def sequential(*layers, mask_zero=False, batch_size=None, time=None):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input(batch_shape=(batch_size, time), dtype="int32", name="tokens"),
            keras.layers.Embedding(9, FEATURES, mask_zero=mask_zero, name="embedding"),
            *layers,
            keras.layers.Dense(2),
        ],
    )


def classifier(layer, classes=3, **kwargs):
    keras.utils.set_random_seed(2)
    dense = keras.layers.Dense(classes, bias_initializer="normal", name="logits")
    return keras.Sequential([keras.Input((TIME, FEATURES), **kwargs), layer, dense])


def with_mask(layer, **kwargs):
    """A model of two inputs: a sequence, and its mask."""
    inputs = keras.Input((TIME, FEATURES), **kwargs), keras.Input((TIME,), dtype="bool")
    return keras.Model(inputs, layer(inputs[0], mask=inputs[1]))


def embed(tokens, model):
    return ops.convert_to_numpy(model.get_layer("embedding")(tokens))


def numpy_lstm(layer, x, edit=None, h=0, c=0, mask=None):
    """All arrays of a layer, and its outputs; see `run_lstm`."""
    w = weights_of(layer.cell)
    outputs, trace, _ = run_lstm(x, w, h, c, mask, edit, layer.go_backwards)
    return trace, outputs


def numpy_trace(layer, x, h=0, c=0, mask=None):
    return numpy_lstm(layer, x, None, h, c, mask)[0]


def apply_dense(model, h):
    kernel, bias = (ops.convert_to_numpy(w) for w in model.get_layer("logits").weights)
    return h @ kernel.astype("float64") + bias


def assert_close(trace, expected, rtol=1e-4, atol=1e-5):
    """Compare a `GateTrace` with a dict of arrays, or with another one."""
    expected = expected if isinstance(expected, dict) else vars(expected)
    for name in ARRAYS:
        np.testing.assert_allclose(
            getattr(trace, name), expected[name], rtol=rtol, atol=atol, err_msg=name
        )


def check_error(match, model, x, layer=None, **kwargs):
    """Check that `trace_gates` raises one short line."""
    with pytest.raises(ValueError, match=match) as error:
        trace_gates(model, x, layer=layer, **kwargs)
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)
