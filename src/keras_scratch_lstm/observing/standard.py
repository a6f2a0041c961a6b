"""The standard cell on torch, which compiles no loop: fewer, larger operations."""

import keras
from keras import ops

from keras_scratch_lstm import recurrence
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


def is_exact(cell):
    """Whether `run_unchanged` gives what the loop does: c is not rounded coarsely."""
    return cell.compute_dtype in ("float32", "float64")


def run_unchanged(cell, x, h, c, names):
    """Run without maps and masks: all hidden states first, and then what is named.

    Returns:
        `(states, arrays)`: the last `h` and `c`, and a dict of name -> tensor.
    """
    weights = [_per_gate(cell, prefix) for prefix in ("W_x", "W_h")]
    b = _per_gate(cell, "b_") if cell.use_bias else None
    # Also within `force`, and not by cuDNN, whose TF32 would not agree with the gates.
    with recurrence.force("torch"):
        lstm = recurrence.implementations(use_cudnn=False)["torch"]
    h_all, *states = lstm(x, h, c, *weights, b, mask=None, training=False)
    arrays = {"h": h_all, "output": h_all}
    if set(names) - set(arrays):
        before = ops.concatenate([h[None], h_all[:-1]])
        gates = cell.gates(x.flatten(0, 1), before.flatten(0, 1), None)
        gates = Gates(*(values.view_as(h_all) for values in gates))
        arrays |= {**gates._asdict(), "c": _cell_states(c, *gates)}
    return states, {name: arrays[name] for name in names}


def _cell_states(c, i, f, o, c_tilde):
    c_all = []
    for new, f_t in zip((i * c_tilde).unbind(), f.unbind(), strict=True):
        c = new.addcmul(f_t, c)
        c_all.append(c)
    return recurrence.stack(c_all)


def _fuse(cell, prefix):
    return ops.concatenate(_per_gate(cell, prefix), axis=-1)


def _per_gate(cell, prefix):
    weights = (getattr(cell, prefix + gate) for gate in GATES)
    return [ops.convert_to_tensor(weight, cell.compute_dtype) for weight in weights]
