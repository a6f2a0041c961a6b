"""The recurrence on torch: `torch.lstm`, in oneDNN on a CPU and in cuDNN on a GPU.

torch concatenates the gates along rows, in the order i, f, c, o.
"""

import torch

from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES

_PADDING = (-1e4, 1e4, 0, 0)  # pre-activations at padding, for i, f, o, c


def has_gpu():
    return torch.cuda.is_available() and torch.backends.cudnn.is_available()


def gradient(function, tensors):
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        value = function(tensors)
        return torch.autograd.grad(value, tensors, materialize_grads=True)


def lstm(x, h, c, W_x, W_h, b, mask, training):
    if mask is not None and not _is_padding(mask, h, c):
        return _loop(x, h, c, W_x, W_h, b, mask)
    try:
        # oneDNN has no LSTM in the dtypes of autocast on a CPU.
        with (
            torch.backends.cudnn.flags(enabled=False),
            torch.autocast(x.device.type, enabled=x.device.type != "cpu"),
        ):
            if mask is None:
                return _torch_lstm(x, h, c, W_x, W_h, b)
            return _padded_lstm(x, h, c, W_x, W_h, b, mask)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):  # within `torch.vmap`
            raise
        return _loop(x, h, c, W_x, W_h, b, mask)


def lstm_in_cudnn(x, h, c, W_x, W_h, b, mask, training):
    if mask is not None or x.device.type != "cuda":
        raise NotImplementedError
    return _torch_lstm(x, h, c, W_x, W_h, b)


def _torch_lstm(x, h, c, W_x, W_h, b):
    weights = [_fuse(W_x), _fuse(W_h)]
    if b is not None:
        bias = _fuse(b)
        weights += [bias, torch.zeros_like(bias)]
    training = torch.is_grad_enabled()
    h_all, h, c = torch.lstm(
        x, (h[None], c[None]), weights, b is not None, 1, 0.0, training, False, False
    )
    return h_all, h[0], c[0]


def _is_padding(mask, h, c):
    """Whether a sample has no masked time step between unmasked ones.

    With masked time steps at the start, it also needs initial states of zero.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    starts = mask[0] + (mask[1:] & ~mask[:-1]).sum(0)
    try:
        return bool((starts <= 1).all()) and bool(
            mask[0].all() or not (h.any() or c.any())
        )
    except RuntimeError:  # no values, within `torch.vmap` or on the device `meta`
        return False


def _padded_lstm(x, h, c, W_x, W_h, b, mask):
    """`torch.lstm` with one more input, which at padding sets i to 0 and f to 1.

    So `c` stays exactly the same there, and `h` is that of the last unmasked time step.
    """
    padding = ~mask[:, :, None]
    x = torch.cat([x.masked_fill(padding, 0), padding.to(x.dtype)], -1)
    rows = (W.new_full((1, W.shape[1]), z) for W, z in zip(W_x, _PADDING, strict=True))
    W_x = [torch.cat(pair) for pair in zip(W_x, rows, strict=True)]
    h_all, _, c = _torch_lstm(x, h, c, W_x, W_h, b)
    time = torch.arange(len(x), device=x.device)[:, None]
    last = torch.where(mask, time, 0).cummax(0).values
    h_all = h_all.gather(0, last[:, :, None].expand_as(h_all))
    return h_all, h_all[-1], c


def _fuse(weights):
    of_gate = dict(zip(GATES, weights, strict=True))
    return torch.cat([of_gate[gate].t() for gate in FUSED_ORDER])


def _loop(x, h, c, W_x, W_h, b, mask=None):
    """A loop over time: `torch.lstm` supports neither gaps in masks nor `vmap`."""
    z = x @ torch.cat(W_x, -1)
    if b is not None:
        z = z + torch.cat(b, -1)
    W_h = torch.cat(W_h, -1)
    h_all = []
    for t, z_t in enumerate(z):
        z_i, z_f, z_o, z_c = (z_t + h @ W_h).chunk(4, -1)
        c_new = z_f.sigmoid() * c + z_i.sigmoid() * z_c.tanh()
        h_new = output = z_o.sigmoid() * c_new.tanh()
        if mask is not None:
            mask_t = mask[t, :, None]
            before = h_all[-1] if h_all else torch.zeros_like(h)
            output = torch.where(mask_t, h_new, before)
            h_new, c_new = torch.where(mask_t, h_new, h), torch.where(mask_t, c_new, c)
        h, c = h_new, c_new
        h_all.append(output)
    return torch.stack(h_all), h, c
