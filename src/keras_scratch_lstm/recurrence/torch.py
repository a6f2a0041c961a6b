"""The recurrence on torch: `torch.lstm`, in oneDNN on a CPU and in cuDNN on a GPU.

torch concatenates the gates along rows, in the order i, f, c, o.
"""

import contextlib

import keras
import torch

from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES, fuse
from keras_scratch_lstm.recurrence.padding import is_padding, run_padded

stack, where = torch.stack, torch.where


def has_gpu():
    return torch.cuda.is_available() and torch.backends.cudnn.is_available()


def gradient(function, tensors):
    with torch.enable_grad():
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        value = function(tensors)
        if not value.requires_grad:  # autograd would raise an error
            return [torch.zeros_like(tensor) for tensor in tensors]
        return torch.autograd.grad(value, tensors, materialize_grads=True)


def no_gradients():
    return torch.no_grad()


def lstm(x, h, c, W_x, W_h, b, mask, training):
    padding_only = mask is None or _is_padding(mask, h, c)
    if not padding_only or _is_compiled_for_training():
        return _loop(x, h, c, W_x, W_h, b, mask)
    try:
        with _disabled_cudnn(x):
            return _fused(x, h, c, W_x, W_h, b, mask)
    except NotImplementedError:
        return _loop(x, h, c, W_x, W_h, b, mask)


def lstm_in_cudnn(x, h, c, W_x, W_h, b, mask, training):
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_traced or x.device.type != "cuda":
        raise NotImplementedError
    if mask is not None and not _is_padding(mask, h, c):
        raise NotImplementedError
    return _fused(x, h, c, W_x, W_h, b, mask)


def _is_compiled_for_training():
    """Whether `torch.compile` needs gradients; those of `torch.lstm` fail there."""
    is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return is_compiled and torch.is_grad_enabled()


def copies(states):
    return _copies_outside(states) if _is_compiled_for_training() else _copies(states)


def _copies(states):
    return [keras.ops.copy(state) for state in states]


# A copy in a graph that also assigns the states would be taken after the assignment.
_copies_outside = torch.compiler.disable(_copies)


def _disabled_cudnn(x):
    if x.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=False)


def _fused(x, h, c, W_x, W_h, b, mask):
    try:
        with torch.autocast("cpu", enabled=False):  # oneDNN has no LSTM in its dtypes
            if mask is None:
                return _torch_lstm(x, h, c, W_x, W_h, b)
            return run_padded(_torch_lstm, x, h, c, W_x, W_h, b, mask)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):  # within `torch.vmap`
            raise
        raise NotImplementedError from error


def _torch_lstm(x, h, c, W_x, W_h, b):
    in_cuda = x.device.type == "cuda"
    if b is None and in_cuda:
        b = W_h[0].new_zeros((len(GATES), h.shape[-1])).unbind()
    weights = [_fuse(W_x), _fuse(W_h)]
    if b is not None:
        bias = fuse(b)  # without `t`, which Core ML lacks for one axis
        weights += [bias, torch.zeros_like(bias)]
    if in_cuda:  # cuDNN needs all weights and biases in one buffer
        buffer = torch.cat([weight.flatten() for weight in weights])
        parts = buffer.split([weight.numel() for weight in weights])
        pairs = zip(parts, weights, strict=True)
        weights = [part.view(weight.shape) for part, weight in pairs]
    states = h[None].contiguous(), c[None].contiguous()
    training = torch.is_grad_enabled()
    h_all, h, c = torch.lstm(
        x, states, weights, b is not None, 1, 0.0, training, False, False
    )
    return h_all, h[0], c[0]


def _is_padding(mask, h, c):
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return bool(is_padding(mask, h, c))
    except RuntimeError:  # no values, within `torch.vmap` or on the device `meta`
        return False


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
