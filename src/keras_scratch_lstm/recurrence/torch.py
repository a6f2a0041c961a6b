"""The recurrence on torch: its own `lstm`, which is cuDNN's on a GPU.

torch has the gates in the order i, f, c, o, one below the other.
"""

import torch


def has_gpu():
    return torch.cuda.is_available() and torch.backends.cudnn.is_available()


def lstm(x, h, c, W_x, W_h, b, mask, training):
    if mask is not None:
        return _loop(x, h, c, W_x, W_h, b, mask)
    with torch.backends.cudnn.flags(enabled=False):
        return _torch_lstm(x, h, c, W_x, W_h, b)


def lstm_in_cudnn(x, h, c, W_x, W_h, b, mask, training):
    if mask is not None or x.device.type != "cuda":
        raise NotImplementedError
    return _torch_lstm(x, h, c, W_x, W_h, b)


def _torch_lstm(x, h, c, W_x, W_h, b):
    weights = [_stacked(W_x), _stacked(W_h)]
    if b is not None:
        bias = _stacked(b)
        weights += [bias, torch.zeros_like(bias)]
    training = torch.is_grad_enabled()
    h_all, h, c = torch.lstm(
        x, (h[None], c[None]), weights, b is not None, 1, 0.0, training, False, False
    )
    return h_all, h[0], c[0]


def _stacked(weights):
    i, f, o, c = (weight.t() for weight in weights)
    return torch.cat([i, f, c, o])


def _loop(x, h, c, W_x, W_h, b, mask):
    """Step by step, since `torch.lstm` knows no mask."""
    z = x @ torch.cat(W_x, -1)
    if b is not None:
        z = z + torch.cat(b, -1)
    W_h = torch.cat(W_h, -1)
    outputs = [torch.zeros_like(h)]
    for z_t, kept in zip(z, mask[:, :, None], strict=True):
        z_i, z_f, z_o, z_c = (z_t + h @ W_h).chunk(4, -1)
        c_new = z_f.sigmoid() * c + z_i.sigmoid() * z_c.tanh()
        h_new = z_o.sigmoid() * c_new.tanh()
        outputs.append(torch.where(kept, h_new, outputs[-1]))
        h, c = torch.where(kept, h_new, h), torch.where(kept, c_new, c)
    return torch.stack(outputs[1:]), h, c
