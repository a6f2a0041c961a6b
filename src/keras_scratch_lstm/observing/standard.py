"""The standard cell on torch, which compiles no loop: fewer, larger operations."""

import keras
from keras import ops

from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
from keras_scratch_lstm.per_gate import GATES


def applies(cell):
    """Whether the cell has the standard equations, on torch."""
    return (
        keras.backend.backend() == "torch"
        and isinstance(cell, ScratchLSTMCell)
        and cell.is_standard
    )


def project(cell, x):
    """Return the inputs after one matmul, and the step that takes them."""
    z_x = x @ _fuse(cell, "W_x")
    z_x = z_x + _fuse(cell, "b_") if cell.use_bias else z_x
    W_h = _fuse(cell, "W_h")

    def step(z_x, states, observe):
        h, c = states
        # Methods of tensors: functions of `keras.ops` take several times as long.
        z = z_x.addmm(h, W_h)
        gates = *z[:, : -cell.units].sigmoid().chunk(3, -1), z[:, -cell.units :].tanh()
        i, f, o, c_tilde = map(observe, Gates._fields, gates)
        c = observe("c", (i * c_tilde).addcmul(f, c))
        h = observe("h", o * c.tanh())
        return h, [h, c], {**Gates(i, f, o, c_tilde)._asdict(), "c": c, "h": h}

    return z_x, step


def _fuse(cell, prefix):
    weights = [ops.convert_to_tensor(getattr(cell, prefix + gate)) for gate in GATES]
    return ops.cast(ops.concatenate(weights, axis=-1), cell.compute_dtype)
