"""The recurrence on JAX: a scan with a hand-written backward pass.

In training, the gates run in two fused matmuls, of i with f and of o with c, which is
faster than one or four. They overwrite their inputs, and the gradients their factors,
which saves a third of the memory. A single sample takes one matmul, since copying the
weights would cost as much as a time step. `docs/backward-pass.md` has the derivation in
the same symbols.
"""

import functools

import jax
from jax import lax, tree
from jax import numpy as jnp


def lstm(x, h, c, W_x, W_h, b, mask, training):
    weights = (tuple(W_x), tuple(W_h), None if b is None else tuple(b))
    mask = None if mask is None else mask[:, :, None]
    try:
        return _recurrence(x, h, c, *weights, mask)
    except TypeError as error:
        if "forward-mode" not in str(error):  # which `custom_vjp` does not support
            raise
        raise NotImplementedError from error


def gradient(function, tensors):
    return jax.grad(function)(tensors)


def compiled(function):
    return jax.jit(function)


def scan(body, carry, xs, like):
    return lax.scan(body, carry, xs)


def repeat_masked_outputs(outputs, mask):
    t = jnp.where(mask, jnp.arange(mask.shape[1]), -1)
    last_unmasked = lax.cummax(t, axis=1)[:, :, None]
    repeated = jnp.take_along_axis(outputs, jnp.maximum(last_unmasked, 0), axis=1)
    return jnp.where(last_unmasked < 0, jnp.zeros_like(repeated), repeated)


def _sigmoid(z):
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)  # XLA has a faster tanh than sigmoid


@jax.custom_vjp
def _recurrence(x, h_0, c_0, W_x, W_h, b, mask):
    # Without differentiation, there are no residuals.
    def step(states, inputs):
        states, (h, _), _ = _step((W_h, b), states, *inputs)
        return states, h

    (h, c), h_all = lax.scan(step, (h_0, c_0), (mask, [x @ W for W in W_x]))
    return h_all, h, c


def _forward(x, h_0, c_0, W_x, W_h, b, mask):
    per_matmul, scan = (4, _scan) if h_0.shape[0] == 1 else (2, _scan_in_place)
    W_x, W_h, b = (_fuse(weights, per_matmul) for weights in (W_x, W_h, b))
    (h, c), (h_all, c_all), gates = scan(
        _step, False, (W_h, b), (h_0, c_0), mask, [x @ W for W in W_x]
    )
    return (h_all, h, c), (gates, h_all, c_all, x, h_0, c_0, W_x, W_h, b, mask)


def _step(weights, states, mask, z):
    """One time step, with the gates fused as the weights are."""
    (W_h, b), (h, c) = weights, states
    z = [z_part + h @ W_part for z_part, W_part in zip(z, W_h, strict=True)]
    if b is not None:
        z = [z_part + b_part for z_part, b_part in zip(z, b, strict=True)]
    z_i, z_f, z_o, z_c = _split(z)
    i, f, o, c_tilde = _sigmoid(z_i), _sigmoid(z_f), _sigmoid(z_o), jnp.tanh(z_c)
    c_new = f * c + i * c_tilde
    h_new = o * jnp.tanh(c_new)
    if mask is not None:
        c_new = jnp.where(mask, c_new, c)
        h_new = jnp.where(mask, h_new, h)
    states = (h_new, c_new)
    return states, states, _fuse((i, f, o, c_tilde), 4 // len(z))


def _backward(residuals, gradients):
    gates, h_all, c_all, x, h_0, c_0, W_x, W_h, b, mask = residuals
    dh_all, dh_last, dc_last = gradients
    i, f, o, c_tilde = _split(gates)
    c_prev = jnp.concatenate([c_0[None], c_all[:-1]])
    h_prev = jnp.concatenate([h_0[None], h_all[:-1]])
    tanh_c = jnp.tanh(c_all)
    # The factors of dc and dh, for all time steps at once.
    dz_factors = jnp.concatenate(
        [
            c_tilde * i * (1 - i),
            c_prev * f * (1 - f),
            tanh_c * o * (1 - o),
            i * (1 - c_tilde**2),
        ],
        -1,
    )
    dc_per_dh, dc_prev_per_dc = o * (1 - tanh_c**2), f
    if mask is not None:
        dz_factors, dc_per_dh = (
            jnp.where(mask, factor, 0) for factor in (dz_factors, dc_per_dh)
        )
        dc_prev_per_dc = jnp.where(mask, f, 1)
    W_x, W_h = (jnp.concatenate(W, -1) for W in (W_x, W_h))
    # A transposed copy is faster to multiply by, except for a single sample.
    W, scan = (W_h, _scan) if h_0.shape[0] == 1 else (W_h.T, _scan_in_place)
    (dh_0, dc_0), _, dz = scan(
        _backward_step,
        True,
        W,
        (dh_last, dc_last),
        (dh_all, dc_per_dh, dc_prev_per_dc, mask),
        dz_factors,
    )
    dx = dz @ W_x.T
    return dx, dh_0, dc_0, *_weight_gradients(x, h_prev, dz, b), None


def _backward_step(W, gradients, inputs, dz_factors):
    (dh, dc), (dh_out, dc_per_dh, dc_prev_per_dc, mask) = gradients, inputs
    dh += dh_out
    dc += dh * dc_per_dh
    dz = jnp.concatenate([dc, dc, dh, dc], -1) * dz_factors
    dh_prev = (W @ dz.T).T if dz.shape[0] == 1 else dz @ W
    if mask is not None:
        dh_prev += jnp.where(mask, 0, dh)
    return (dh_prev, dc * dc_prev_per_dc), None, dz


def _weight_gradients(x, h_prev, dz, b):
    """The gradients of all weights, in one matmul over all time steps."""
    inputs = [x, h_prev, jnp.ones((*x.shape[:2], 1), dz.dtype)]
    features, units = x.shape[-1], h_prev.shape[-1]
    if x.shape[1] == 1:  # per gate, to avoid copies
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


def _scan(step, reverse, weights, states, inputs, buffers):
    """Scan `step(weights, states, inputs_t, buffers_t)` over time.

    It returns the states, its outputs, which are stacked, and the new `buffers_t`.
    """

    def body(states, values):
        states, outputs, after = step(weights, states, *values)
        return states, (outputs, after)

    values = (inputs, buffers)
    states, (outputs, buffers) = lax.scan(body, states, values, reverse=reverse)
    return states, outputs, buffers


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _scan_in_place(step, reverse, weights, states, inputs, buffers):
    """The same, with `buffers` updated in place."""

    def body(carry, values):
        (states, arrays), (t, inputs) = carry, values
        before = tree.map(lambda array: array[t], arrays)
        states, outputs, after = step(weights, states, inputs, before)
        arrays = tree.map(lambda array, new: array.at[t].set(new), arrays, after)
        return (states, arrays), outputs

    carry = (states, buffers)
    values = (jnp.arange(tree.leaves(buffers)[0].shape[0]), inputs)
    (states, buffers), outputs = lax.scan(body, carry, values, reverse=reverse)
    return states, outputs, buffers


@_scan_in_place.defjvp
def _derivative(step, reverse, primals, tangents):
    # Differentiating in-place updates would copy the buffers at every time step.
    return jax.jvp(functools.partial(_scan, step, reverse), primals, tangents)


def _fuse(gates, per_matmul):
    if gates is None:
        return None
    parts = (gates[k : k + per_matmul] for k in range(0, 4, per_matmul))
    return [jnp.concatenate(part, -1) for part in parts]


def _split(parts):
    return [gate for part in parts for gate in jnp.split(part, 4 // len(parts), -1)]
