"""The recurrence on JAX: a scan forth, and a scan back derived by hand.

In training the gates run two by two, i with f and o with c: with one product of all
four, or with four, it took about a seventh longer at 256 units on two cores. Without
gradients, where nothing is kept, four products took a third less than two.

In training the gates are written over what they were computed from, and the gradients
over their factors, which takes a third less memory: from some 30 MB on, new memory in
each step costs as much time as the products do.

For one sample a copy of the weights costs as much as a step: one product of all four
and nothing transposed took some 5 ms in place of 7.6 at 512 units; and to write over
took a sixth longer. The letters and the derivation are in docs/backward.md.
"""

import functools

import jax
from jax import lax, tree
from jax import numpy as jnp


def has_gpu():
    return jax.default_backend() == "gpu"


def lstm(x, h, c, W_x, W_h, b, mask, training):
    weights = (tuple(W_x), tuple(W_h), None if b is None else tuple(b))
    return _recurrence(x, h, c, *weights, None if mask is None else mask[:, :, None])


def _sigmoid(z):
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)  # XLA has a faster tanh than sigmoid


@jax.custom_vjp
def _recurrence(x, h_0, c_0, W_x, W_h, b, kept):
    # Where no gradient is asked for, nothing is kept for it.
    def step(states, inputs):
        states, (h, _), _ = _step((W_h, b), states, *inputs)
        return states, h

    (h, c), h_all = lax.scan(step, (h_0, c_0), (kept, [x @ W for W in W_x]))
    return h_all, h, c


def _forward(x, h_0, c_0, W_x, W_h, b, kept):
    together, scan = (4, _scan) if h_0.shape[0] == 1 else (2, _scan_in_place)
    W_x, W_h, b = (_side_by_side(weights, together) for weights in (W_x, W_h, b))
    (h, c), (h_all, c_all), gates = scan(
        _step, False, (W_h, b), (h_0, c_0), kept, [x @ W for W in W_x]
    )
    return (h_all, h, c), (gates, h_all, c_all, x, h_0, c_0, W_x, W_h, b, kept)


def _step(weights, states, kept, z):
    """One step, its gates in as many parts as the weights are."""
    (W_h, b), (h, c) = weights, states
    z = [z_part + h @ W_part for z_part, W_part in zip(z, W_h, strict=True)]
    if b is not None:
        z = [z_part + b_part for z_part, b_part in zip(z, b, strict=True)]
    z_i, z_f, z_o, z_c = _by_gate(z)
    i, f, o, c_tilde = _sigmoid(z_i), _sigmoid(z_f), _sigmoid(z_o), jnp.tanh(z_c)
    c_new = f * c + i * c_tilde
    h_new = o * jnp.tanh(c_new)
    if kept is not None:
        c_new = jnp.where(kept, c_new, c)
        h_new = jnp.where(kept, h_new, h)
    states = (h_new, c_new)
    return states, states, _side_by_side((i, f, o, c_tilde), 4 // len(z))


def _backward(residuals, gradients):
    gates, h_all, c_all, x, h_0, c_0, W_x, W_h, b, kept = residuals
    dh_all, dh_last, dc_last = gradients
    i, f, o, c_tilde = _by_gate(gates)
    c_before = jnp.concatenate([c_0[None], c_all[:-1]])
    h_before = jnp.concatenate([h_0[None], h_all[:-1]])
    tanh_c = jnp.tanh(c_all)
    # What dc and dh are multiplied by, for all steps at once.
    to_z = jnp.concatenate(
        [
            c_tilde * i * (1 - i),
            c_before * f * (1 - f),
            tanh_c * o * (1 - o),
            i * (1 - c_tilde**2),
        ],
        -1,
    )
    to_c, through_c = o * (1 - tanh_c**2), f
    if kept is not None:
        to_z, to_c = to_z * kept, to_c * kept
        through_c = jnp.where(kept, f, 1)
    W_x, W_h = (jnp.concatenate(W, -1) for W in (W_x, W_h))
    # A copy the other way round is faster to multiply by, but not for one sample.
    W, scan = (W_h, _scan) if h_0.shape[0] == 1 else (W_h.T, _scan_in_place)
    (dh_0, dc_0), _, dz = scan(
        _step_back, True, W, (dh_last, dc_last), (dh_all, to_c, through_c, kept), to_z
    )
    # That of `x` falls away in a compiled step that has no use for it.
    dx = dz @ W_x.T
    return dx, dh_0, dc_0, *_over_all_steps(x, h_before, dz, b), None


def _step_back(W, gradients, inputs, to_z):
    (dh, dc), (dh_out, to_c, through_c, kept) = gradients, inputs
    dh += dh_out
    dc += dh * to_c
    dz = jnp.concatenate([dc, dc, dh, dc], -1) * to_z
    dh_before = (W @ dz.T).T if dz.shape[0] == 1 else dz @ W
    if kept is not None:
        dh_before += jnp.where(kept, 0, dh)
    return (dh_before, dc * through_c), None, dz


def _over_all_steps(x, h_before, dz, b):
    """The gradients of all weights, over all steps at once."""
    inputs = [x, h_before, jnp.ones((*x.shape[:2], 1), dz.dtype)]
    features, units = x.shape[-1], h_before.shape[-1]
    if x.shape[1] == 1:  # gate by gate, and nothing is copied
        dz = jnp.split(dz[:, 0], 4, -1)
        dW_x, dW_h, db = ([v[:, 0].T @ dz_gate for dz_gate in dz] for v in inputs)
    else:
        rows = jnp.concatenate(inputs, -1).reshape(-1, features + units + 1)
        dW = rows.T @ dz.reshape(-1, 4 * units)
        dW = jnp.split(dW, [features, features + units])
        dW_x, dW_h, db = (jnp.split(d, 4, -1) for d in dW)
    db = None if b is None else tuple(d[0] for d in db)
    return tuple(dW_x), tuple(dW_h), db


_recurrence.defvjp(_forward, _backward)


def _scan(step, reverse, weights, states, inputs, replaced):
    """Runs a step over all steps, and stacks its outputs and its replacements.

    The step takes the weights, the states, and its own of `inputs` and `replaced`. It
    returns the states, its outputs, and what takes the place of its own of `replaced`.
    """

    def at(states, values):
        states, outputs, after = step(weights, states, *values)
        return states, (outputs, after)

    values = (inputs, replaced)
    states, (outputs, replaced) = lax.scan(at, states, values, reverse=reverse)
    return states, outputs, replaced


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _scan_in_place(step, reverse, weights, states, inputs, replaced):
    """The same, with `replaced` written over."""

    def at(carried, values):
        (states, arrays), (t, inputs) = carried, values
        before = tree.map(lambda array: array[t], arrays)
        states, outputs, after = step(weights, states, inputs, before)
        arrays = tree.map(lambda array, new: array.at[t].set(new), arrays, after)
        return (states, arrays), outputs

    carried = (states, replaced)
    values = (jnp.arange(tree.leaves(replaced)[0].shape[0]), inputs)
    (states, replaced), outputs = lax.scan(at, carried, values, reverse=reverse)
    return states, outputs, replaced


@_scan_in_place.defjvp
def _derivative(step, reverse, primals, tangents):
    # That of what is written over would copy all of it in each step.
    return jax.jvp(functools.partial(_scan, step, reverse), primals, tangents)


def _side_by_side(gates, together):
    if gates is None:
        return None
    parts = (gates[k : k + together] for k in range(0, 4, together))
    return [jnp.concatenate(part, -1) for part in parts]


def _by_gate(parts):
    return [gate for part in parts for gate in jnp.split(part, 4 // len(parts), -1)]
