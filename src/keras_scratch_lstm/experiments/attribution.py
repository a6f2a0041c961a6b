"""Attribute the output of a model to the time steps of an LSTM's inputs."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import activations, ops

from keras_scratch_lstm import _keras, _validation, recurrence
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.experiments import loop
from keras_scratch_lstm.experiments.interventions import Selection, select
from keras_scratch_lstm.per_gate import named_weights


class Decomposition(NamedTuple):
    """The contributions of a span of time steps, and of all others.

    Each is an array of shape `(batch, time, units)` or `(batch, time, classes)`. Their
    sum is the hidden state, or the logits, at every time step.
    """

    beta: np.ndarray
    gamma: np.ndarray


def contextual_decomposition(
    model_or_layer: Any,
    inputs: Any,
    span: Selection,
    layer: Any = None,
    head: Any = None,
) -> Decomposition:
    """Split the hidden state into the contribution of a span, and that of the rest.

    `beta` is what the inputs of the span contribute, alone and through the biases;
    `gamma` is what involves other time steps or the initial state. `beta + gamma` is
    the hidden state. Sums inside the gates are split by their Shapley values, biases
    first. The output gate is not split.

    Args:
        model_or_layer: See `trace_gates`.
        inputs: See `run_with_edits`.
        span: Integer, slice or list of integers, the time steps of the span.
        layer: See `run_with_edits`. It must have sigmoid gates, tanh activations and
            a cell without changes.
        head: A `keras.layers.Dense` of the model that reads the hidden state, or its
            name. Then the contributions are those to its logits, without activation;
            its bias is in `gamma`. Default: `None`.

    Returns:
        `Decomposition(beta, gamma)`: two float64 arrays of shape
        `(batch, time, units)`, or `(batch, time, classes)` with `head`. Masked time
        steps repeat the previous values.

    Raises:
        ValueError: If an argument is invalid.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import contextual_decomposition
    >>> model = keras.Sequential([
    ...     keras.Input((10, 8)),
    ...     keras.layers.LSTM(4),
    ...     keras.layers.Dense(3, name="logits"),
    ... ])
    >>> x = np.ones((1, 10, 8))
    >>> parts = contextual_decomposition(model, x, slice(2, 5), head="logits")
    >>> sums = parts.beta + parts.gamma
    >>> np.allclose(sums[:, -1], model.predict(x, verbose=0), atol=1e-5)
    True

    References:

    - [Murdoch, Liu and Yu, 2018](https://arxiv.org/abs/1801.05453)
    """
    call = loop.find_call(model_or_layer, inputs, layer)
    _check_cell(call.layer)
    in_span = np.isin(np.arange(call.shape[1]), select("span", span, call.shape[1]))
    dense = None if head is None else _find_head(call, head)
    beta, gamma = _decompose(call, in_span)
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
    )
    if not is_standard:
        raise ValueError(
            "`layer` must have sigmoid gates, tanh activations and a cell that does not"
            f" override `gates`. Received: {layer.name!r}"
        )


def _find_head(call, head):
    layers = _keras.all_layers(call.model)
    found = [layer for layer in layers if layer is head or layer.name == head]
    units = call.shape[2]
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


def _decompose(call, in_span):
    w = {name: _float64(value) for name, value in named_weights(call.layer.cell)}
    batch, time, units = call.shape
    x = call.sequences.astype("float64")
    beta_h, beta_c = np.zeros((2, batch, units))
    gamma_h, gamma_c = call.h.astype("float64"), call.c.astype("float64")
    beta, gamma = np.zeros((2, batch, time, units))
    mask = np.ones((batch, time), bool) if call.mask is None else call.mask
    for t in reversed(range(time)) if call.layer.go_backwards else range(time):
        terms = {}
        for gate in "ifoc":
            z_x = x[:, t] @ w[f"W_x{gate}"]
            z_beta, z_gamma = beta_h @ w[f"W_h{gate}"], gamma_h @ w[f"W_h{gate}"]
            bias = w.get(f"b_{gate}", np.zeros(units))
            terms[gate] = z_beta + z_x * in_span[t], z_gamma + z_x * ~in_span[t], bias
        states = _step(terms, beta_c, gamma_c, in_span[t])
        # Masked time steps keep the states.
        beta_h, gamma_h, beta_c, gamma_c = (
            np.where(mask[:, t, None], new, old)
            for new, old in zip(states, (beta_h, gamma_h, beta_c, gamma_c), strict=True)
        )
        beta[:, t], gamma[:, t] = beta_h, gamma_h
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


def integrated_gradients(
    model_or_layer: Any,
    inputs: Any,
    target: int | tuple[int, ...],
    layer: Any = None,
    baseline: Any = 0.0,
    points: int = 16,
) -> np.ndarray:
    """Attribute an output to the inputs of an LSTM by integrated gradients.

    The scores of a sample add up to the difference between its output and the output
    for the baseline. Sum over the last axis for one score per time step.

    The model runs as in `run_with_edits`. Needs the TensorFlow, JAX or PyTorch
    backend.

    Args:
        model_or_layer: See `trace_gates`.
        inputs: See `run_with_edits`.
        target: Integer or tuple of integers, the index of the output to attribute, in
            the output of one sample: `k` for outputs of shape `(batch, classes)`,
            `(t, k)` for `(batch, time, classes)`.
        layer: See `run_with_edits`.
        baseline: Number, or array that broadcasts to the inputs of the LSTM, of shape
            `(batch, time, features)`. Default: 0.
        points: Positive integer, the number of points of the path from the baseline
            to the inputs, by Gauss-Legendre quadrature. Default: 16.

    Returns:
        Array of shape `(batch, time, features)`.

    Raises:
        ValueError: If an argument is invalid.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import integrated_gradients
    >>> model = keras.Sequential(
    ...     [keras.Input((10, 8)), keras.layers.LSTM(4), keras.layers.Dense(3)]
    ... )
    >>> scores = integrated_gradients(model, np.ones((1, 10, 8)), target=2)
    >>> scores.sum(axis=-1).shape
    (1, 10)

    References:

    - [Sundararajan, Taly and Yan, 2017](https://arxiv.org/abs/1703.01365)
    """
    points = _validation.positive_integer("points", points)
    call = loop.find_call(model_or_layer, inputs, layer)
    x = call.sequences
    try:
        start = _validation.to_numpy(baseline, x.dtype)
        difference = x - np.broadcast_to(start, x.shape)
    except (TypeError, ValueError):
        rule = f"a number or an array that broadcasts to {x.shape}"
        raise _validation.invalid("baseline", baseline, rule) from None
    index = target if isinstance(target, tuple) else (target,)

    def output_of(sequences):
        outputs, _ = loop.run(call, loop.unchanged, new_sequences=sequences[0])
        return ops.sum(_pick(outputs, index, target))

    total = np.zeros(x.shape)
    # Nodes and weights on the interval from -1 to 1.
    for node, weight in zip(*np.polynomial.legendre.leggauss(points), strict=True):
        at = (x - difference * (1 - node) / 2).astype(x.dtype)
        (gradient,) = recurrence.gradient(output_of, [at])
        total += weight / 2 * ops.convert_to_numpy(gradient)
    return (difference * total).astype(x.dtype)


def _pick(outputs, index, target):
    shape = tuple(getattr(outputs, "shape", ()))[1:]
    is_valid = len(index) == len(shape) and all(
        isinstance(k, (int, np.integer))
        and not isinstance(k, bool)
        and -size <= k < size
        for k, size in zip(index, shape, strict=True)
    )
    if not is_valid:
        rule = f"an index of one sample's output, of shape {shape}"
        raise _validation.invalid("target", target, rule)
    return outputs[(slice(None), *index)]
