"""Models to experiment on, and an LSTM with edits in NumPy, float64, as reference."""

import keras
import numpy as np
from keras import ops
from reference import sigmoid, weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

BATCH, TIME, FEATURES, UNITS = 3, 5, 2, 4
ARRAYS = ("i", "f", "o", "c_tilde", "c", "h")


@keras.saving.register_keras_serializable("edit_reference")
class PeepholeCell(ScratchLSTMCell):
    """Its forget gate depends on the cell state."""

    def build(self, input_shape):
        super().build(input_shape)
        self.W_cf = self.add_weight(
            name="W_cf", shape=(self.units,), initializer="random_normal"
        )

    def gates(self, x, h, c):
        z = x @ self.W_xf + h @ self.W_hf + self.b_f + c * self.W_cf
        return super().gates(x, h, c)._replace(f=ops.sigmoid(z))


LAYERS = {
    "LSTM": lambda **kwargs: keras.layers.LSTM(UNITS, **kwargs),
    "RNN(LSTMCell)": lambda **kwargs: keras.layers.RNN(
        keras.layers.LSTMCell(UNITS), **kwargs
    ),
    "ScratchLSTM": lambda **kwargs: ScratchLSTM(UNITS, **kwargs),
    "RNN(ScratchLSTMCell)": lambda **kwargs: keras.layers.RNN(
        ScratchLSTMCell(UNITS), **kwargs
    ),
    "custom cell": lambda **kwargs: ScratchLSTM(cell=PeepholeCell(UNITS), **kwargs),
}


def make(kind, **kwargs):
    keras.utils.set_random_seed(1)
    layer = LAYERS[kind](**kwargs)
    layer.build((BATCH, TIME, FEATURES))
    return layer


def classifier(layer, classes=3, **kwargs):
    keras.utils.set_random_seed(2)
    dense = keras.layers.Dense(classes, bias_initializer="normal", name="logits")
    return keras.Sequential([keras.Input((TIME, FEATURES), **kwargs), layer, dense])


def float64_weights(cell):
    """Weights by name, in float64, also of the built-in cell."""
    if isinstance(cell, ScratchLSTMCell):
        return weights_of(cell)
    w = {}
    for prefix, weight in zip(("W_x", "W_h", "b_"), cell.weights, strict=False):
        fused = ops.convert_to_numpy(weight).astype("float64")
        parts = zip("ifco", np.split(fused, 4, axis=-1), strict=True)
        w |= {prefix + gate: part for gate, part in parts}
    return w


def numpy_lstm(layer, x, edit=None, h=0, c=0, mask=None):
    """Run an LSTM with edits.

    `edit(name, values, t)` returns the new values of an array of shape
    `(batch, units)`. Returns a dict of name -> array of shape `(batch, time, units)`,
    NaN at masked time steps, and the outputs of the layer.
    """
    edit = edit or (lambda name, values, t: values)
    w = float64_weights(layer.cell)
    batch, time, _ = x.shape
    h, c = (np.zeros((batch, UNITS)) + state for state in (h, c))
    mask = np.ones((batch, time), bool) if mask is None else mask
    trace = {name: np.full((batch, time, UNITS), np.nan) for name in ARRAYS}
    outputs, output = {}, np.zeros((batch, UNITS))
    for t in reversed(range(time)) if layer.go_backwards else range(time):
        z = {
            gate: x[:, t].astype("float64") @ w[f"W_x{gate}"]
            + h @ w[f"W_h{gate}"]
            + w.get(f"b_{gate}", 0)
            for gate in "ifoc"
        }
        z["f"] += c * w.get("W_cf", 0)
        new = {gate: edit(gate, sigmoid(z[gate]), t) for gate in "ifo"}
        new["c_tilde"] = edit("c_tilde", np.tanh(z["c"]), t)
        new["c"] = edit("c", new["f"] * c + new["i"] * new["c_tilde"], t)
        new["h"] = edit("h", new["o"] * np.tanh(new["c"]), t)
        unmasked = mask[:, t, None]
        for name, values in new.items():
            trace[name][:, t] = np.where(unmasked, values, np.nan)
        output = outputs[t] = np.where(unmasked, new["h"], output)
        h, c = np.where(unmasked, new["h"], h), np.where(unmasked, new["c"], c)
    return trace, np.stack(list(outputs.values()), axis=1)


def apply_dense(model, h):
    kernel, bias = (ops.convert_to_numpy(w) for w in model.get_layer("logits").weights)
    return h @ kernel.astype("float64") + bias
