"""References in NumPy, float64, and what most tests need to compare with them."""

import os
import re
import subprocess
import sys

import keras
import numpy as np

NAMES = ["W_xi", "W_hi", "b_i", "W_xf", "W_hf", "b_f"]
NAMES += ["W_xo", "W_ho", "b_o", "W_xc", "W_hc", "b_c"]


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def weights_of(cell):
    """The weights of a cell by name, in float64."""
    return {weight.name: np.array(weight).astype("float64") for weight in cell.weights}


def gates(x, h, c, w):
    """`i`, `f`, `o` and `c_tilde`; `W_cf` is the peephole of a `PeepholeCell`."""
    z = {k: x @ w[f"W_x{k}"] + h @ w[f"W_h{k}"] + w.get(f"b_{k}", 0) for k in "ifoc"}
    z["f"] += c * w.get("W_cf", 0)
    return *(sigmoid(z[k]) for k in "ifo"), np.tanh(z["c"])


def lstm_step(x, h, c, w):
    i, f, o, c_tilde = gates(x, h, c, w)
    c = f * c + i * c_tilde
    return o * np.tanh(c), c


def lstm(x, w, h=0, c=0, mask=None):
    """The whole sequence: `h` of all time steps, and the last states."""
    h, c = (np.zeros((len(x), w["W_hi"].shape[0])) + state for state in (h, c))
    outputs = []
    for t in range(x.shape[1]):
        new_h, new_c = lstm_step(x[:, t].astype("float64"), h, c, w)
        unmasked = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(unmasked, new_h, h), np.where(unmasked, new_c, c)
        outputs.append(h)
    return np.stack(outputs, 1), h, c


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
