import itertools

import numpy as np
import pytest
from keras import ops
from models import (
    BATCH,
    TIME,
    UNITS,
    apply_dense,
    classifier,
    make,
    numpy_lstm,
    with_mask,
)
from reference import sigmoid, weights_of

from keras_scratch_lstm import contextual_decomposition

BOTH = pytest.mark.parametrize("kind", ["LSTM", "ScratchLSTM"])


def decompose(model, x, **kwargs):
    parts = contextual_decomposition(model, x, **kwargs)
    return parts.beta, parts.gamma


def shapley(function, bias, terms):
    """Average the increments over all orders of the terms, after the bias."""
    contributions = [np.zeros_like(term) for term in terms]
    orders = list(itertools.permutations(range(len(terms))))
    for order in orders:
        total = bias
        for k in order:
            contributions[k] += (function(total + terms[k]) - function(total)) / len(
                orders
            )
            total = total + terms[k]
    return [*contributions, function(bias)]


def decompose_in_numpy(layer, x, span):
    """The equations of Murdoch, Liu and Yu, with their products written out."""
    w = weights_of(layer.cell)
    beta_c, gamma_c, beta, gamma = np.zeros((4, len(x), UNITS))
    for t in range(x.shape[1]):
        inside = t in span
        parts, o = {}, 0
        for gate, function in zip("ifoc", [sigmoid] * 3 + [np.tanh], strict=True):
            terms = [beta @ w[f"W_h{gate}"], gamma @ w[f"W_h{gate}"]]
            terms[0 if inside else 1] += x[:, t] @ w[f"W_x{gate}"]
            bias = np.broadcast_to(w[f"b_{gate}"], terms[0].shape)
            parts[gate] = shapley(function, bias, terms)
        (i_b, i_g, i_0), (f_b, f_g, f_0) = parts["i"], parts["f"]
        c_b, c_g, c_0 = parts["c"]
        o = sum(parts["o"])
        beta_u = i_b * c_b + i_b * c_0 + i_0 * c_b + inside * i_0 * c_0
        gamma_u = i_g * (c_b + c_g + c_0) + (i_b + i_0) * c_g
        gamma_u += (not inside) * i_0 * c_0
        gamma_c = (f_b + f_g + f_0) * gamma_c + f_g * beta_c + gamma_u
        beta_c = (f_b + f_0) * beta_c + beta_u
        beta, gamma, _ = shapley(np.tanh, 0.0, [beta_c, gamma_c])
        beta, gamma = o * beta, o * gamma
    return beta, gamma


@BOTH
@pytest.mark.parametrize("span", [slice(1, 3), [0, -1], slice(None)], ids=str)
def test_decomposition_matches_the_equations(kind, span, x):
    layer = make(kind)
    steps = np.atleast_1d(np.arange(TIME)[span])
    beta, gamma = decompose(layer, x, steps=span)
    expected = decompose_in_numpy(layer, x.astype("float64"), steps)
    np.testing.assert_allclose(beta[:, -1], expected[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(gamma[:, -1], expected[1], rtol=1e-6, atol=1e-9)


@BOTH
def test_decomposition_sums_to_the_hidden_states_and_logits(kind, x):
    layer = make(kind, return_sequences=True)
    model = classifier(layer)
    _, h = numpy_lstm(layer, x)
    for span in (0, slice(2, 4), None):
        beta, gamma = decompose(model, x, steps=span)
        np.testing.assert_allclose(beta + gamma, h, atol=1e-5)
        for head in ("logits", model.layers[1]):
            beta, gamma = decompose(model, x, steps=span, head=head)
            np.testing.assert_allclose(beta + gamma, apply_dense(model, h), atol=1e-5)
            np.testing.assert_allclose(
                beta + gamma, ops.convert_to_numpy(model(x)), atol=1e-5
            )


def test_decomposition_of_other_layers(x):
    """Backwards, stateful, masked, without bias."""
    layer = make("ScratchLSTM", go_backwards=True, stateful=True, use_bias=False)
    layer(x)
    states = [ops.convert_to_numpy(state) for state in layer.states]
    beta, gamma = decompose(layer, x, steps=1)
    trace, _ = numpy_lstm(layer, x, h=states[0], c=states[1])
    np.testing.assert_allclose(beta + gamma, trace["h"], atol=1e-5)
    np.testing.assert_array_equal(beta[:, 2:], 0)  # read before the span
    mask = np.ones((BATCH, TIME), bool)
    mask[1, 2:] = False
    layer = make("LSTM")
    beta, gamma = decompose(with_mask(layer), [x, mask], steps=1)
    _, h = numpy_lstm(layer, x, mask=mask)
    np.testing.assert_allclose(beta + gamma, h, atol=1e-5)


@pytest.mark.one_backend
def test_layers_that_cannot_be_decomposed(x):
    def check(message, model, **options):
        with pytest.raises(ValueError, match=message):
            contextual_decomposition(model, x, **{"steps": 0} | options)

    check("does not override `gates`", make("custom cell"))
    check("must have sigmoid gates, tanh", make("LSTM", activation="relu"))
    model = classifier(make("LSTM"))
    check("`steps` must be .* some of 7. Received: steps=7", model, steps=TIME)
    check("`head` must be a `Dense` .* Received: head='lstm'", model, head="lstm")
    check("`head` must be a `Dense` layer of the model with 4", model, head="none")
