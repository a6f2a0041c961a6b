"""Contextual decomposition: what a span of time steps contributes."""

from dataclasses import dataclass

import keras
import numpy as np
from keras import activations, ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm._types import Data, Layer, Model, Path, Selection
from keras_scratch_lstm._validation import select
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.call import run
from keras_scratch_lstm.observing.inputs import read
from keras_scratch_lstm.observing.loop import keep_masked
from keras_scratch_lstm.per_gate import GATES, named_weights


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The result of `contextual_decomposition`.

    The sum of both arrays is the hidden state, or the logits, at every time step.

    Attributes:
        beta: Array of shape `(batch, time, units)` or `(batch, time, classes)`, the
            contribution of the span.
        gamma: Array of the same shape, that of all other time steps.
    """

    beta: np.ndarray
    gamma: np.ndarray


def contextual_decomposition(
    model: Model | Path,
    inputs: Data,
    *,
    steps: Selection,
    layer: Layer | None = None,
    head: Layer | None = None,
    call_index: int = 0,
    batch_size: int = 32,
    batches: int | None = 1,
) -> Decomposition:
    """Split the hidden state into the contribution of a span, and that of the rest.

    `beta` is what the inputs of the span contribute, alone and through the biases;
    `gamma` is what involves other time steps or the initial state. `beta + gamma` is
    the hidden state. Sums inside the gates are split by their Shapley values, biases
    first. The output gate is not split.

    Two choices differ from the paper: `x W_x + h W_h` of the span is one term of a
    gate, not two. And the product of the biases of i and c̃ counts for the span at
    each of its time steps, not at the last time step of the sequence.

    Arguments that are not listed are those of `trace_gates`.

    Args:
        steps: Integer, slice or list of integers, the time steps of the span.
        layer: See `trace_gates`; of a `Bidirectional` layer, one of its two layers.
            It must have sigmoid gates, tanh activations and a cell without changes.
        head: A `keras.layers.Dense` of the model that reads the hidden state, or its
            name. Then the contributions are those to its logits, without activation;
            its bias is in `gamma`. Default: `None`.

    Returns:
        A `Decomposition` of float64 arrays. Masked time steps repeat the previous
        values.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import contextual_decomposition
    >>> model = keras.Sequential([
    ...     keras.Input((10, 8)),
    ...     keras.layers.LSTM(4),
    ...     keras.layers.Dense(3, name="logits"),
    ... ])
    >>> x = np.ones((1, 10, 8))
    >>> parts = contextual_decomposition(
    ...     model, x, steps=slice(2, 5), head="logits"
    ... )
    >>> sums = parts.beta + parts.gamma
    >>> np.allclose(sums[:, -1], model.predict(x, verbose=0), atol=1e-5)
    True

    References:

    - [Murdoch, Liu and Yu, 2018](https://arxiv.org/abs/1801.05453)
    """
    model, lstm = models.select_one(model, layer)
    _check_cell(lstm)
    dense = None if head is None else _find_head(model, head, lstm.cell.units)
    parts = []
    for batch in read(model, inputs, batch_size=batch_size, batches=batches):
        _, found = run(model, batch, [lstm], None, ("x",), call_index)
        arrays = found[lstm]
        time = arrays["x"].shape[1]
        in_span = np.isin(np.arange(time), select("steps", steps, time))
        parts.append(_decompose(lstm, in_span, **arrays))
    beta, gamma = (np.concatenate(several) for several in zip(*parts, strict=True))
    if dense is not None:
        kernel, *bias = (_float64(weight) for weight in dense.weights)
        beta, gamma = beta @ kernel, gamma @ kernel + sum(bias)
    return Decomposition(beta, gamma)


def _check_cell(layer):
    cell = layer.cell
    is_standard = (
        cell.activation is activations.tanh
        and cell.recurrent_activation is activations.sigmoid
        and getattr(type(cell), "gates", None) in (None, ScratchLSTMCell.gates)
        and type(cell).call in (keras.layers.LSTMCell.call, ScratchLSTMCell.call)
    )
    if not is_standard:
        raise ValueError(
            "`layer` must have sigmoid gates, tanh activations and a cell that does "
            f"not override `gates` or `call`. Received: {layer.name!r}"
        )


def _find_head(model, head, units):
    layers = _keras.all_layers(model)
    found = [layer for layer in layers if layer is head or layer.name == head]
    if not (
        found
        and isinstance(found[0], keras.layers.Dense)
        and found[0].kernel.shape[0] == units
    ):
        rule = f"a `Dense` layer of the model with {units} inputs, or its name"
        raise _validation.invalid("head", getattr(head, "name", head), rule)
    return found[0]


def _float64(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def _decompose(lstm, in_span, x, h_0, c_0, mask=None):
    w = {name: _float64(value) for name, value in named_weights(lstm.cell)}
    batch, time, _ = x.shape
    x, states = x.astype("float64"), np.zeros((4, *h_0.shape))
    states[1], states[3] = h_0, c_0
    beta, gamma = np.zeros((2, batch, time, h_0.shape[1]))
    for t in reversed(range(time)) if lstm.go_backwards else range(time):
        beta_h, gamma_h, beta_c, gamma_c = states
        terms = {}
        for gate in GATES:
            z_x = x[:, t] @ w[f"W_x{gate}"]
            z_beta, z_gamma = beta_h @ w[f"W_h{gate}"], gamma_h @ w[f"W_h{gate}"]
            bias = w.get(f"b_{gate}", np.zeros(h_0.shape[1]))
            terms[gate] = z_beta + z_x * in_span[t], z_gamma + z_x * ~in_span[t], bias
        new = _step(terms, beta_c, gamma_c, in_span[t])
        if mask is not None:
            new = keep_masked(mask[:, t, None], new, states, np.where)
        states = new
        beta[:, t], gamma[:, t] = states[:2]
    return beta, gamma


def _step(terms, beta_c, gamma_c, in_span):
    """Decompose one time step; each of `terms` is `(beta, gamma, bias)` of a gate."""
    i_beta, i_gamma, i_bias = _shapley(_sigmoid, *terms["i"])
    f_beta, f_gamma, f_bias = _shapley(_sigmoid, *terms["f"])
    c_tilde_beta, c_tilde_gamma, c_tilde_bias = _shapley(np.tanh, *terms["c"])
    i, f = i_beta + i_gamma + i_bias, f_beta + f_gamma + f_bias
    o = _sigmoid(sum(terms["o"]))
    c_tilde = c_tilde_beta + c_tilde_gamma + c_tilde_bias
    c = f * (beta_c + gamma_c) + i * c_tilde
    beta_c = (f_beta + f_bias) * beta_c
    beta_c += (i_beta + i_bias) * (c_tilde_beta + c_tilde_bias)
    if not in_span:
        beta_c -= i_bias * c_tilde_bias
    gamma_c = c - beta_c
    beta_h, gamma_h, _ = _shapley(np.tanh, beta_c, gamma_c, 0.0)
    return o * beta_h, o * gamma_h, beta_c, gamma_c


def _shapley(function, beta, gamma, bias):
    """Split `function(beta + gamma + bias)` into three terms, the bias first."""
    alone = function(bias)
    with_beta, with_gamma = function(bias + beta), function(bias + gamma)
    total = function(bias + beta + gamma)
    return (
        (with_beta - alone + total - with_gamma) / 2,
        (with_gamma - alone + total - with_beta) / 2,
        alone,
    )


def _sigmoid(z):
    return (1 + np.tanh(z / 2)) / 2
