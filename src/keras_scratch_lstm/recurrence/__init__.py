"""How a whole sequence runs fast: one contract, and one file a backend.

Each file has one function, the contract:

    lstm(x, h, c, W_x, W_h, b, mask, training) -> (h_all, h, c)

- `x`: the sequence, `(time, batch, features)`.
- `h`, `c`: the states to begin with, each `(batch, units)`.
- `W_x`, `W_h`, `b`: the weights of the gates, four tensors each in the order
  i, f, o, c: `(features, units)`, `(units, units)` and `(units,)`. Without
  bias, `b` is `None`.
- `mask`: Boolean tensor `(time, batch)`, or `None`. A step that it marks
  `False` leaves `h` and `c` as they are.
- `training`: Boolean, whether to be fast with gradients or without. They are due in
  both cases.

It returns the outputs, `(time, batch, units)`, and the last `h` and `c`. The
output of a step is `h`; where the mask marks the first steps `False`, it is what
Keras puts out on that backend, zeros on TensorFlow and torch. Gates are sigmoid,
activations tanh.

It may raise `NotImplementedError` for what it does not serve; the layer then runs
the plain loop of `keras.layers.RNN`, which all are tested against.

Nothing here knows of layers or variables.
"""

import contextlib
import contextvars
import importlib

import keras

_allowed = contextvars.ContextVar("allowed", default=None)  # of each thread its own


def implementations(use_cudnn="auto"):
    """The implementations available on this backend and machine, best first.

    Returns:
        Dict of a way's name to its function `lstm`. The plain loop, `"loop"`,
        is not among them, since it is the layer's own.
    """
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax", "torch"):
        return {}
    module = importlib.import_module(f"{__name__}.{backend}")
    found = {}
    if use_cudnn and module.has_gpu():
        cudnn = importlib.import_module(f"{__name__}.cudnn")
        found["cudnn"] = getattr(module, "lstm_in_cudnn", cudnn.lstm)
    if use_cudnn is not True:
        found[backend] = module.lstm
    allowed = _allowed.get()
    return {name: lstm for name, lstm in found.items() if allowed in (None, name)}


@contextlib.contextmanager
def force(name):
    """Allows one way alone, or the plain loop, in this thread.

    Args:
        way: `"loop"`, `"tensorflow"`, `"jax"`, `"torch"` or `"cudnn"`.
    """
    before = _allowed.set(name)
    try:
        yield
    finally:
        _allowed.reset(before)
