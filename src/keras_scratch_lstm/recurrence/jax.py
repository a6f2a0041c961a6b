"""The recurrence on JAX: a scan forth, and a scan back derived by hand.

The gates run side by side in one product, which XLA does best. The letters and
the derivation are in docs/backward.md.
"""

import jax
from jax import lax
from jax import numpy as jnp


def has_gpu():
    return jax.default_backend() == "gpu"


def lstm(x, h, c, W_x, W_h, b, mask):
    b = None if b is None else jnp.concatenate(b, -1)
    W_x, W_h = jnp.concatenate(W_x, -1), jnp.concatenate(W_h, -1)
    return _recurrence(x, h, c, W_x, W_h, b, mask)


@jax.custom_vjp
def _recurrence(x, h_0, c_0, W_x, W_h, b, mask):
    # Where no gradient is asked for, nothing is kept for it.
    h, c, (h_all,) = _scan(x, h_0, c_0, W_x, W_h, b, mask, keep=slice(-1, None))
    return h_all, h, c


def _forward(x, h_0, c_0, W_x, W_h, b, mask):
    h, c, saved = _scan(x, h_0, c_0, W_x, W_h, b, mask, keep=slice(None))
    return (saved[-1], h, c), (saved, x, h_0, c_0, W_x, W_h, b, mask)


def _scan(x, h_0, c_0, W_x, W_h, b, mask, keep):
    """The loop forth, and of the values of each step those to `keep`."""
    units = h_0.shape[-1]

    def step(states, inputs):
        h, c = states
        z, kept = inputs
        z += h @ W_h
        # One sigmoid of three gates: of each by itself, XLA's took half as long again.
        i, f, o = jnp.split(jax.nn.sigmoid(z[:, : 3 * units]), 3, -1)
        c_tilde = jnp.tanh(z[:, 3 * units :])
        c_new = f * c + i * c_tilde
        h_new = o * jnp.tanh(c_new)
        if kept is not None:
            c_new = jnp.where(kept, c_new, c)
            h_new = jnp.where(kept, h_new, h)
        return (h_new, c_new), (i, f, o, c_tilde, c_new, h_new)[keep]

    z = x @ W_x if b is None else x @ W_x + b
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
    W_h_T = W_h.T

    def step_back(gradients, inputs):
        dh, dc = gradients
        dh_out, (to_i, to_f, to_o, to_c_tilde), to_c, through_c, kept = inputs
        dh += dh_out
        dc += dh * to_c
        dz = jnp.concatenate([dc * to_i, dc * to_f, dh * to_o, dc * to_c_tilde], -1)
        dh_before = dz @ W_h_T
        if kept is not None:
            dh_before += jnp.where(kept, 0, dh)
        return (dh_before, dc * through_c), dz

    (dh_0, dc_0), dz = lax.scan(
        step_back,
        (dh_last, dc_last),
        (dh_all, to_z, to_c, through_c, kept),
        reverse=True,
    )
    # The gradients of all weights in one product over all steps. That of `x`
    # falls away in a compiled step that has no use for it.
    ones = [] if b is None else [jnp.ones((*x.shape[:2], 1), dz.dtype)]
    rows = jnp.concatenate([x, h_before, *ones], -1)
    dW = rows.reshape(-1, rows.shape[-1]).T @ dz.reshape(-1, dz.shape[-1])
    features, units = W_x.shape[0], W_h.shape[0]
    dW_x, dW_h, db = jnp.split(dW, [features, features + units])
    db = None if b is None else db[0]
    return dz @ W_x.T, dh_0, dc_0, dW_x, dW_h, db, None


_recurrence.defvjp(_forward, _backward)
