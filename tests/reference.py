"""References in NumPy, float64, and what most tests need to compare with them."""

import functools
import os
import re
import subprocess
import sys

import keras
import numpy as np

ARRAYS = ("i", "f", "o", "c_tilde", "c", "h")
NAMES = ["W_xi", "W_hi", "b_i", "W_xf", "W_hf", "b_f"]
NAMES += ["W_xo", "W_ho", "b_o", "W_xc", "W_hc", "b_c"]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def weights_of(cell):
    """The weights of a cell by name, in float64: one per matrix of the equations."""
    if isinstance(cell, keras.layers.LSTMCell):
        w = {}
        for prefix, weight in zip(("W_x", "W_h", "b_"), cell.weights, strict=False):
            parts = np.split(np.array(weight).astype("float64"), 4, axis=-1)
            w |= {prefix + gate: part for gate, part in zip("ifco", parts, strict=True)}
        return w
    norms = [getattr(cell, name, None) for name in ("norm_x", "norm_h", "norm_c")]
    w = {f"{norm.name}/{v.name}": v for norm in norms if norm for v in norm.weights}
    w |= {weight.name: weight for weight in cell.weights}
    w = {name: np.array(weight).astype("float64") for name, weight in w.items()}
    rates = {name: getattr(cell, name, None) for name in ("zoneout_h", "zoneout_c")}
    return w | {name: rate for name, rate in rates.items() if rate is not None}


def lstm_arrays(x, h, c, w, edit=lambda name, values: values):
    """One time step of any cell, in inference, by the names of its weights.

    `edit(name, values)` returns the new values of an array. What is computed from it
    sees the new ones. Returns a dict of array name -> values.
    """
    z_x, z_h = (
        {k: v @ w.get(prefix + k, 0 * w[prefix + "i"]) for k in "ifco"}
        for v, prefix in ((x, "W_x"), (h, "W_h"))
    )
    for name, z in ("norm_x", z_x), ("norm_h", z_h):
        normed = _layer_norm(np.concatenate([z[k] for k in "ifco"], -1), w, name)
        z.update(zip("ifco", np.split(normed, 4, -1), strict=True))
    z = {k: z_x[k] + z_h[k] + w.get(f"b_{k}", 0) for k in "ifco"}
    z["i"] = z["i"] + w.get("p_i", 0) * c
    z["f"] = z["f"] + w.get("p_f", w.get("W_cf", 0)) * c  # `W_cf`: a `PeepholeCell`
    is_coupled, is_zoneout = "W_xf" not in w, "zoneout_c" in w
    i = edit("i", sigmoid(z["i"]))
    f = edit("f", 1 - i if is_coupled else sigmoid(z["f"]))
    c_tilde = edit("c_tilde", np.tanh(z["c"]))
    c_new = _layer_norm(f * c + i * c_tilde, w, "norm_c")
    c_new = c_new if is_zoneout else edit("c", c_new)
    o = edit("o", sigmoid(z["o"] + w.get("p_o", 0) * c_new))
    h_new = o * np.tanh(c_new)
    if is_zoneout:
        c_new = edit("c", w["zoneout_c"] * c + (1 - w["zoneout_c"]) * c_new)
        h_new = w["zoneout_h"] * h + (1 - w["zoneout_h"]) * h_new
    return dict(zip(ARRAYS, (i, f, o, c_tilde, c_new, edit("h", h_new)), strict=True))


def _layer_norm(z, w, name):
    if f"{name}/gamma" not in w:
        return z
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-3)
    return z * w[f"{name}/gamma"] + w[f"{name}/beta"]


def lstm_step(x, h, c, w):
    arrays = lstm_arrays(x, h, c, w)
    return arrays["h"], arrays["c"]


def lstm(x, w, h=0, c=0, mask=None):
    """The whole sequence: `h` of all time steps, and the last states."""
    outputs, _, states = run_lstm(x, w, h, c, mask)
    return outputs, *states


def run_lstm(x, w, h=0, c=0, mask=None, edit=None, backwards=False):
    """Run an LSTM, with edits: `edit(name, values, t)` returns the new values.

    Returns the outputs in the order of the loop, a dict of the arrays in the order of
    the inputs, NaN at masked time steps, and the last states.
    """
    edit = edit or (lambda name, values, t: values)
    batch, time, _ = x.shape
    units = w["W_hi"].shape[0]
    h, c = (np.zeros((batch, units)) + (0 if s is None else s) for s in (h, c))
    mask = np.ones((batch, time), bool) if mask is None else mask
    trace = {name: np.full((batch, time, units), np.nan) for name in ARRAYS}
    outputs, output = [], np.zeros((batch, units))
    for t in reversed(range(time)) if backwards else range(time):
        change = functools.partial(_at, edit, t)
        arrays = lstm_arrays(x[:, t].astype("float64"), h, c, w, change)
        unmasked = mask[:, t, None]
        for name, values in arrays.items():
            trace[name][:, t] = np.where(unmasked, values, np.nan)
        output = np.where(unmasked, arrays["h"], output)
        h, c = (np.where(unmasked, arrays[k], v) for k, v in (("h", h), ("c", c)))
        outputs.append(output)
    return np.stack(outputs, 1), trace, (h, c)


def _at(edit, t, name, values):
    return edit(name, values, t)


def tensor(array):
    """A float tensor that NumPy cannot read on torch, like one on a GPU."""
    tensor = keras.ops.convert_to_tensor(np.float32(array))
    return tensor.requires_grad_() if hasattr(tensor, "requires_grad_") else tensor


def fuse(values):
    """Twelve (or eight) per-gate arrays as the built-in cell's three (or two)."""
    step = len(values) // 4
    i, f, o, c = (values[k : k + step] for k in range(0, len(values), step))
    return [np.concatenate(parts, -1) for parts in zip(i, f, c, o, strict=True)]


def cross_entropy(y_true, logits):
    """The cross-entropy of each token."""
    logits = logits.astype("float64")
    logits = logits - logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(-1))
    return log_sum - np.take_along_axis(logits, y_true[..., None], -1)[..., 0]


def label(parameter):
    """A parameter as the name of a test, without addresses, which vary by process."""
    return re.sub(r" at 0x[0-9a-f]+|(?<=\w)_\d+", "", str(parameter))


def flat(tree):
    """The tensors of nested lists and dicts, as float64 arrays."""
    tensors = keras.tree.flatten(tree)
    return [keras.ops.convert_to_numpy(one).astype("float64") for one in tensors]


def assert_close(actual, expected, atol=1e-5, rtol=0):
    """Compare nested tensors or arrays, of which none may be constant."""
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert np.ptp(other) > 0  # not all masked or dropped
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def run_python(*arguments, **environment):
    """Run Python in another process; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
