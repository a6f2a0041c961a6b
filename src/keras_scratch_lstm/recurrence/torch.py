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
            return _fused(_torch_lstm, x, h, c, W_x, W_h, b, mask)
    except NotImplementedError:
        return _loop(x, h, c, W_x, W_h, b, mask)


def lstm_in_cudnn(x, h, c, W_x, W_h, b, mask, training):
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_traced or x.device.type != "cuda":
        raise NotImplementedError
    if mask is not None and not _is_padding(mask, h, c):
        raise NotImplementedError
    return _fused(_cudnn_lstm, x, h, c, W_x, W_h, b, mask)


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


def _fused(lstm, x, h, c, W_x, W_h, b, mask):
    try:
        with torch.autocast("cpu", enabled=False):  # oneDNN has no LSTM in its dtypes
            if mask is None or 0 in mask.shape:  # an empty batch
                return lstm(x, h, c, W_x, W_h, b)
            return run_padded(lstm, x, h, c, W_x, W_h, b, mask)
    except RuntimeError as error:
        if "Batching rule not implemented" not in str(error):  # within `torch.vmap`
            raise
        raise NotImplementedError from error


def _torch_lstm(x, h, c, W_x, W_h, b):
    weights = [_fuse(W_x), _fuse(W_h)]
    if b is not None:
        bias = fuse(b)  # without `t`, which Core ML lacks for one axis
        weights += [bias, torch.zeros_like(bias)]
    return _run(x, h, c, weights)


def _cudnn_lstm(x, h, c, W_x, W_h, b):
    return _run(x, h, c, pack(W_x, W_h, b))


def _run(x, h, c, weights):
    states, has_biases = (h[None].contiguous(), c[None].contiguous()), len(weights) > 2
    training = torch.is_grad_enabled()
    h_all, h, c = torch.lstm(
        x, states, weights, has_biases, 1, 0.0, training, False, False
    )
    return h_all, h[0], c[0]


def pack(W_x, W_h, b):
    """The weights and both biases for `torch.lstm`, in one buffer, as cuDNN needs them.

    It is filled at every call: nothing tells whether a kept one is up to date, since
    `weight.data.clamp_()` does not change `weight._version`.
    """
    weights = [*_in_fused_order(W_x), *_in_fused_order(W_h)]
    return _Packed.apply(*weights, *(() if b is None else _in_fused_order(b)))


class _Packed(torch.autograd.Function):
    """One node of autograd, whose gradients have the layout of the weights."""

    @staticmethod
    def forward(*weights):
        W_x, W_h, b = weights[:4], weights[4:8], weights[8:]
        (features, units), rows = W_x[0].shape, 4 * W_h[0].shape[0]
        sizes = [rows * features, rows * units, rows, rows]
        packed = list(W_x[0].new_zeros(sum(sizes)).split(sizes))
        packed[:2] = packed[0].view(rows, features), packed[1].view(rows, units)
        torch.cat([W.t() for W in W_x], out=packed[0])
        torch.cat([W.t() for W in W_h], out=packed[1])
        if b:
            torch.cat(b, out=packed[2])
        return tuple(packed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.use_bias = len(inputs) > 8

    @staticmethod
    def backward(ctx, dW_x, dW_h, db, _):
        dW_x, dW_h = (dW.unflatten(0, (4, -1)).mT.contiguous() for dW in (dW_x, dW_h))
        return *dW_x.unbind(), *dW_h.unbind(), *(db.chunk(4) if ctx.use_bias else ())

    @staticmethod
    def vmap(info, in_dims, *weights):
        raise NotImplementedError


def _is_padding(mask, h, c):
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    try:
        return bool(is_padding(mask, h, c))
    except RuntimeError:  # no values, within `torch.vmap` or on the device `meta`
        return False


def _fuse(weights):
    return torch.cat([W.t() for W in _in_fused_order(weights)])


def _in_fused_order(weights):
    of_gate = dict(zip(GATES, weights, strict=True))
    return [of_gate[gate] for gate in FUSED_ORDER]


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
