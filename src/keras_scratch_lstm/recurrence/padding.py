"""Padded sequences in fused kernels, which know no masks.

At padding, one more input sets i to 0 and f to 1, so that `c` stays exactly the same.
The output there is the last unmasked `h`, or zeros before the first one.
"""

from keras import ops

_PADDING = (-1e4, 1e4, 0, 0)  # pre-activations at padding, for i, f, o, c


def is_padding(mask, h, c):
    """Whether no sample has a masked time step between unmasked ones.

    With masked time steps at the start, it also needs initial states of zero.
    """
    starts = ops.logical_and(mask[1:], ops.logical_not(mask[:-1]))
    starts = ops.sum(ops.cast(starts, "int32"), 0) + ops.cast(mask[0], "int32")
    has_zero_states = ops.logical_not(ops.logical_or(ops.any(h), ops.any(c)))
    return ops.logical_and(
        ops.all(starts <= 1), ops.logical_or(ops.all(mask[0]), has_zero_states)
    )


def run_padded(lstm, x, h, c, W_x, W_h, b, mask):
    """Run `lstm(x, h, c, W_x, W_h, b)` on sequences for which `is_padding` is true."""
    unmasked = mask[:, :, None]
    padding = ops.cast(ops.logical_not(unmasked), x.dtype)
    x = ops.concatenate([ops.where(unmasked, x, 0), padding], -1)
    W_x = [
        ops.concatenate([W, ops.full_like(W[:1], z)])
        for W, z in zip(W_x, _PADDING, strict=True)
    ]
    h_all, _, c = lstm(x, h, c, W_x, W_h, b)
    t = ops.cumsum(ops.ones_like(mask, dtype="int32"), 0) - 1
    last = ops.max(ops.where(mask, t, 0), 0)
    h = ops.sum(ops.where((t == last)[:, :, None], h_all, 0), 0)
    return ops.where((t <= last)[:, :, None], h_all, h), h, c
