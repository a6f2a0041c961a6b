"""The recurrence on JAX: a scan forth, and a scan back derived by hand.

In training the gates run two by two, i with f and o with c: with one product of all
four, or with four, it took about a seventh longer at 256 units on two cores. Without
gradients, where nothing is kept, four products took a third less than two. For one
sample a copy of the weights costs as much as a step: one product of all four and
nothing transposed took some 5 ms in place of 7.6 at 512 units. The letters and the
derivation are in docs/backward.md.
"""

import jax
from jax import lax
from jax import numpy as jnp


def has_gpu():
    return jax.default_backend() == "gpu"


def lstm(x, h, c, W_x, W_h, b, mask, training):
    weights = (tuple(W_x), tuple(W_h), None if b is None else tuple(b))
    return _recurrence(x, h, c, *weights, mask)


def _sigmoid(z):
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)  # XLA has a faster tanh than sigmoid


@jax.custom_vjp
def _recurrence(x, h_0, c_0, W_x, W_h, b, mask):
    # Where no gradient is asked for, nothing is kept for it.
    h, c, (h_all,) = _scan(x, h_0, c_0, W_x, W_h, b, mask, keep=slice(-1, None))
    return h_all, h, c


def _forward(x, h_0, c_0, W_x, W_h, b, mask):
    together = 4 if h_0.shape[0] == 1 else 2
    W_x, W_h, b = (_side_by_side(weights, together) for weights in (W_x, W_h, b))
    h, c, saved = _scan(x, h_0, c_0, W_x, W_h, b, mask, keep=slice(None))
    return (saved[-1], h, c), (saved, x, h_0, c_0, W_x, W_h, b, mask)


def _side_by_side(weights, together):
    if weights is None:
        return None
    parts = (weights[k : k + together] for k in range(0, 4, together))
    return tuple(jnp.concatenate(part, -1) for part in parts)


def _scan(x, h_0, c_0, W_x, W_h, b, mask, keep):
    """The loop forth, and of the values of each step those to `keep`.

    The weights are those of four gates, of two pairs of them, or of all together.
    """

    def step(states, inputs):
        h, c = states
        z, kept = inputs
        z = [z_part + h @ W_part for z_part, W_part in zip(z, W_h, strict=True)]
        gates = [jnp.split(z_part, 4 // len(z), -1) for z_part in z]
        z_i, z_f, z_o, z_c = (z_gate for part in gates for z_gate in part)
        i, f, o, c_tilde = _sigmoid(z_i), _sigmoid(z_f), _sigmoid(z_o), jnp.tanh(z_c)
        c_new = f * c + i * c_tilde
        h_new = o * jnp.tanh(c_new)
        if kept is not None:
            c_new = jnp.where(kept, c_new, c)
            h_new = jnp.where(kept, h_new, h)
        return (h_new, c_new), (i, f, o, c_tilde, c_new, h_new)[keep]

    z = [x @ W_part for W_part in W_x]
    if b is not None:
        z = [z_part + b_part for z_part, b_part in zip(z, b, strict=True)]
    kept = None if mask is None else mask[:, :, None]
    (h, c), saved = lax.scan(step, (h_0, c_0), (z, kept))
    return h, c, saved


def _backward(residuals, gradients):
    (i, f, o, c_tilde, c_all, h_all), x, h_0, c_0, W_x, W_h, b, mask = residuals
    dh_all, dh_last, dc_last = gradients
    kept = None if mask is None else mask[:, :, None]
    c_before = jnp.concatenate([c_0[None], c_all[:-1]])
    h_before = jnp.concatenate([h_0[None], h_all[:-1]])
    tanh_c = jnp.tanh(c_all)
    # What dc and dh are multiplied by, for all steps at once.
    to_z = (
        c_tilde * i * (1 - i),
        c_before * f * (1 - f),
        tanh_c * o * (1 - o),
        i * (1 - c_tilde**2),
    )
    to_c, through_c = o * (1 - tanh_c**2), f
    if kept is not None:
        to_z = tuple(factor * kept for factor in to_z)
        to_c, through_c = to_c * kept, jnp.where(kept, f, 1)
    W_x, W_h = (jnp.concatenate(W, -1) for W in (W_x, W_h))
    # A copy the other way round is faster to multiply by, but not for one sample.
    W_h_T = None if h_0.shape[0] == 1 else W_h.T

    def step_back(gradients, inputs):
        dh, dc = gradients
        dh_out, (to_i, to_f, to_o, to_c_tilde), to_c, through_c, kept = inputs
        dh += dh_out
        dc += dh * to_c
        dz = jnp.concatenate([dc * to_i, dc * to_f, dh * to_o, dc * to_c_tilde], -1)
        dh_before = (W_h @ dz.T).T if W_h_T is None else dz @ W_h_T
        if kept is not None:
            dh_before += jnp.where(kept, 0, dh)
        return (dh_before, dc * through_c), dz

    (dh_0, dc_0), dz = lax.scan(
        step_back,
        (dh_last, dc_last),
        (dh_all, to_z, to_c, through_c, kept),
        reverse=True,
    )
    # That of `x` falls away in a compiled step that has no use for it.
    dx = dz @ W_x.T
    return dx, dh_0, dc_0, *_over_all_steps(x, h_before, dz, b), None


def _over_all_steps(x, h_before, dz, b):
    """The gradients of all weights, over all steps at once."""
    inputs = [x, h_before, jnp.ones((*x.shape[:2], 1), dz.dtype)]
    features, units = x.shape[-1], h_before.shape[-1]
    if x.shape[1] == 1:  # gate by gate, and nothing is copied
        dz = jnp.split(dz[:, 0], 4, -1)
        dW_x, dW_h, db = ([v[:, 0].T @ dz_gate for dz_gate in dz] for v in inputs)
    else:
        rows = jnp.concatenate(inputs, -1)
        dW = jnp.einsum("tbr,tbz->rz", rows, dz)
        dW = jnp.split(dW, [features, features + units])
        dW_x, dW_h, db = (jnp.split(d, 4, -1) for d in dW)
    db = None if b is None else tuple(d[0] for d in db)
    return tuple(dW_x), tuple(dW_h), db


_recurrence.defvjp(_forward, _backward)
