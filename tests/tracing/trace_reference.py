"""Models to trace, and a trace in NumPy, float64, to compare with."""

import keras
import numpy as np
import pytest
from custom_cells import PeepholeCell
from keras import ops
from reference import gates, lstm_step, weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, trace_gates
from keras_scratch_lstm.tracing.trace import ARRAYS

BATCH, TIME, FEATURES, UNITS = 5, 7, 3, 4


def rnn(cell_class):
    return lambda **kwargs: keras.layers.RNN(cell_class(UNITS), **kwargs)


LAYERS = {
    "LSTM": lambda **kwargs: keras.layers.LSTM(UNITS, **kwargs),
    "RNN(LSTMCell)": rnn(keras.layers.LSTMCell),
    "RNN(ScratchLSTMCell)": rnn(ScratchLSTMCell),
    "ScratchLSTM": lambda **kwargs: ScratchLSTM(UNITS, **kwargs),
    "custom cell": lambda **kwargs: ScratchLSTM(cell=PeepholeCell(UNITS), **kwargs),
}


def make(kind, **kwargs):
    keras.utils.set_random_seed(1)
    layer = LAYERS[kind](**kwargs)
    layer.build((BATCH, TIME, FEATURES))
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


def embed(tokens, model):
    return ops.convert_to_numpy(model.get_layer("embedding")(tokens))


def named_weights(cell):
    """Weights by name, in float64, also of the built-in cell."""
    if isinstance(cell, ScratchLSTMCell):
        return weights_of(cell)
    fused = [ops.convert_to_numpy(weight).astype("float64") for weight in cell.weights]
    w = {}
    for prefix, values in zip(("W_x", "W_h", "b_"), fused, strict=False):
        parts = np.split(values, 4, axis=-1)
        w |= {prefix + gate: part for gate, part in zip("ifco", parts, strict=True)}
    return w


def numpy_trace(layer, x, h=None, c=None, mask=None):
    """Return all arrays of a trace, time step by time step, in float64."""
    w = named_weights(layer.cell)
    shape = (*x.shape[:2], layer.cell.units)
    h, c = (np.zeros((len(x), shape[2])) if s is None else s for s in (h, c))
    mask = np.ones(shape[:2], bool) if mask is None else mask
    trace = {name: np.full(shape, np.nan) for name in ARRAYS}
    for t in reversed(range(shape[1])) if layer.go_backwards else range(shape[1]):
        x_t, unmasked = x[:, t].astype("float64"), mask[:, t, None]
        h_next, c_next = lstm_step(x_t, h, c, w)
        arrays = *gates(x_t, h, c, w), c_next, h_next
        for name, values in zip(ARRAYS, arrays, strict=True):
            trace[name][:, t] = np.where(unmasked, values, np.nan)
        h, c = np.where(unmasked, h_next, h), np.where(unmasked, c_next, c)
    return trace


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
