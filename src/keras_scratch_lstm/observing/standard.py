"""The standard cell on torch, which compiles no loop: fewer, larger operations."""

import keras
from keras import ops

from keras_scratch_lstm import recurrence
from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
from keras_scratch_lstm.per_gate import GATES


def applies(cell):
    """Whether the cell has the standard equations, on torch; with any activations."""
    return (
        keras.backend.backend() == "torch"
        and isinstance(cell, ScratchLSTMCell)
        and type(cell).gates is ScratchLSTMCell.gates
        and type(cell).call is ScratchLSTMCell.call
    )


def project(cell, x):
    """Return the inputs after one matmul, and the step that takes them."""
    z_x = x @ _fuse(cell, "W_x")
    z_x = z_x + _fuse(cell, "b_") if cell.use_bias else z_x
    W_h = _fuse(cell, "W_h")

    def step(z_x, states, observe):
        h, c = states
        gates = _gates(cell, z_x + h @ W_h)._asdict()
        arrays = {name: observe(name, value) for name, value in gates.items()}
        i, f, o, c_tilde = arrays.values()
        arrays["c"] = c = observe("c", f * c + i * c_tilde)
        arrays["h"] = h = observe("h", o * cell.activation(c))
        return h, [h, c], arrays

    return z_x, step


def has_fast_path(cell):
    """Whether `run_fast` gives the arrays; half precision rounds at each time step."""
    return cell.is_standard and cell.compute_dtype in ("float32", "float64")


def run_fast(cell, x, mask, carry):
    """Run `torch.lstm`, and compute the gates from its `h` in one matmul."""
    _, (h_0, c_0) = carry
    weights = [
        [ops.convert_to_tensor(getattr(cell, prefix + gate)) for gate in GATES]
        for prefix in (("W_x", "W_h", "b_") if cell.use_bias else ("W_x", "W_h"))
    ]
    W_x, W_h, b = weights if cell.use_bias else (*weights, None)
    lstm = recurrence.implementations(use_cudnn=False)["torch"]
    no_axis = None if mask is None else mask[..., 0]
    output, h, c_last = lstm(x, h_0, c_0, W_x, W_h, b, no_axis, False)
    h_prev = ops.concatenate([h_0[None], output[:-1]])
    if mask is not None:  # until the first unmasked time step, the output is zeros
        started = ops.cumsum(ops.cast(mask, "int32"), 0) - ops.cast(mask, "int32") > 0
        h_prev = ops.where(started, h_prev, h_0)
    z_x, _ = project(cell, x)
    gates = _gates(cell, z_x + h_prev @ _fuse(cell, "W_h"))
    c, cell_states = c_0, []
    i_c_tilde = gates.i * gates.c_tilde
    for t, f in enumerate(gates.f):
        new = f * c + i_c_tilde[t]
        c = new if mask is None else ops.where(mask[t], new, c)
        cell_states.append(c)
    arrays = {**gates._asdict(), "c": ops.stack(cell_states), "h": output}
    return (output[-1], [h, c_last]), {"output": output, **arrays}


def _gates(cell, z):
    z_i, z_f, z_o, z_c = ops.split(z, len(GATES), axis=-1)
    sigmoid, tanh = cell.recurrent_activation, cell.activation
    return Gates(sigmoid(z_i), sigmoid(z_f), sigmoid(z_o), tanh(z_c))


def _fuse(cell, prefix):
    weights = [ops.convert_to_tensor(getattr(cell, prefix + gate)) for gate in GATES]
    return ops.cast(ops.concatenate(weights, axis=-1), cell.compute_dtype)
