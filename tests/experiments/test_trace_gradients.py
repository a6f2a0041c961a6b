import keras
import numpy as np
import pytest
from gradients import double_precision
from keras import ops
from models import (
    BATCH,
    FEATURES,
    TIME,
    UNITS,
    apply_dense,
    classifier,
    make,
    numpy_lstm,
)
from reference import ARRAYS

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, trace_gradients

BACKEND = keras.backend.backend()
EPSILON = 1e-5


@pytest.mark.parametrize(
    ("kind", "backwards"),
    [
        ("LSTM", True),
        ("before another LSTM", False),
        *((k, False) for k in ("custom cell", "coupled", "layer norm", "zoneout")),
    ],
)
@pytest.mark.ci
def test_gradients_equal_finite_differences(kind, backwards, rng, dtype_policy):
    """Total derivatives: through all that the cell computes from an array."""
    dtype_policy("float64")
    x = rng.normal(size=(BATCH, TIME, FEATURES))
    y = rng.normal(size=(BATCH, TIME, UNITS))
    mask = np.ones((BATCH, TIME), bool)
    mask[0, 2] = False
    with double_precision():
        options = {"go_backwards": backwards, "return_sequences": True}
        layers = [make("LSTM" if "LSTM" in kind else kind, **options)]
        if kind == "before another LSTM":
            layers.append(keras.layers.LSTM(UNITS, return_sequences=True))
        inputs = [keras.Input((TIME, FEATURES), dtype="float64")]
        inputs.append(keras.Input((TIME,), dtype="bool"))
        outputs = inputs[0]
        for layer in layers:
            # On JAX, Keras's tanh computes in float32.
            layer.cell.activation = lambda x: 2 * ops.sigmoid(2 * x) - 1
            outputs = layer(outputs, mask=inputs[1])
        model = keras.Model(inputs, outputs)
        # Keras's `matmul` and `mean`, and so `Dense` and losses, compute in float32.
        gradients = trace_gradients(
            model, [x, mask], y, loss=lambda y, h: ops.sum((h - y) ** 2), layer=0
        )
        assert gradients.c.dtype == "float64"
        assert np.isnan(gradients.h[0, 2]).all()
        for name in ARRAYS:
            sample, t, unit = (int(rng.integers(size)) for size in (BATCH, TIME, UNITS))
            if not mask[sample, t]:
                continue

            def loss(epsilon, place=(name, sample, t, unit)):
                def edit(array, values, step):
                    values = values.copy()
                    if place[::2] == (array, step):
                        values[place[1::2]] += epsilon
                    return values

                _, h = numpy_lstm(layers[0], x, edit, mask=mask)
                for layer in layers[1:]:
                    _, h = numpy_lstm(layer, h, mask=mask)
                return np.sum((h - y) ** 2)

            expected = (loss(EPSILON) - loss(-EPSILON)) / (2 * EPSILON)
            actual = getattr(gradients, name)[sample, t, unit]
            # On JAX and torch, Keras's layer normalization computes in float32.
            rounded = {"jax": 1e-3, "torch": 1e-4} if kind == "layer norm" else {}
            rel = rounded.get(BACKEND, 1e-6)
            assert actual == pytest.approx(expected, rel=rel, abs=rel / 100)


def test_gradients_of_an_independent_loss_are_zeros(rng):
    class StopGradient(keras.layers.Layer):
        def call(self, x):
            return ops.stop_gradient(x)

    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    model = keras.Sequential([classifier(make("LSTM")), StopGradient()])
    model(x)
    gradients = trace_gradients(model, x, np.ones((BATCH, 3), "float32"), loss="mse")
    np.testing.assert_array_equal(gradients.h, 0)


def test_gradients_of_a_simple_rnn(rng):
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    y = rng.normal(size=(BATCH, 3)).astype("float32")
    model = classifier(keras.layers.SimpleRNN(UNITS))
    gradients = trace_gradients(model, x, y, loss="mse")
    W, U, b, kernel, _ = (np.float64(weight) for weight in model.get_weights())
    h = [np.zeros((BATCH, UNITS))]
    for t in range(TIME):
        h.append(np.tanh(x[:, t] @ W + h[-1] @ U + b))
    expected = 2 * (apply_dense(model, h[-1]) - y) / y.size @ kernel.T
    for t in reversed(range(TIME)):
        np.testing.assert_allclose(gradients.h[:, t], expected, rtol=1e-4, atol=1e-6)
        expected = expected * (1 - h[t + 1] ** 2) @ U.T
    assert np.isnan(gradients.c).all()


@pytest.mark.one_backend
def test_missing_loss(x):
    model = classifier(make("LSTM"))
    with pytest.raises(ValueError, match=r"`loss` must be given, .* not compiled"):
        trace_gradients(model, x, x)
    with pytest.raises(ValueError, match="`loss` must be a loss; metrics have no"):
        trace_gradients(model, x, x, loss=keras.metrics.MeanSquaredError())


def test_masked_loss_is_that_of_evaluate(x, rng):
    """A mask of the outputs, a loss by name and the compiled one."""
    x[:, TIME - 2 :] = 0
    x[1, 3:] = 0
    y = rng.normal(size=(BATCH, TIME, 3)).astype("float32")
    masking = keras.layers.Masking()
    model = classifier(make("LSTM", return_sequences=True))
    model = keras.Sequential([keras.Input((TIME, FEATURES)), masking, *model.layers])
    model.compile(loss="mse")
    compiled = trace_gradients(model, x, y)
    for loss in ("mse", keras.losses.MeanSquaredError()):
        found = trace_gradients(model, x, y, loss=loss)
        np.testing.assert_allclose(found.c, compiled.c, rtol=1e-4, atol=1e-7)
    mask = (x != 0).any(-1)
    kernel, bias = (np.float64(weight) for weight in model.layers[-1].get_weights())
    _, h = numpy_lstm(model.layers[1], x, mask=mask)
    last = 2 * (h @ kernel + bias - y)[0, TIME - 3] / 3 / mask.sum() @ kernel.T
    np.testing.assert_allclose(compiled.h[0, TIME - 3], last, rtol=1e-4, atol=1e-7)


@pytest.mark.ci
def test_both_directions_and_datasets(x, rng):
    y = rng.normal(size=(BATCH, 3)).astype("float32")
    both = keras.layers.Bidirectional(make("ScratchLSTM"))
    model = classifier(both)
    gradients = trace_gradients(model, x, y, loss="mse")
    layer, dataset = both.backward_layer, iter([(x, y)])
    alone = trace_gradients(model, dataset, loss="mse", layer=layer)
    assert gradients.backward.layer == layer.name
    for found, h in ((gradients, 0), (gradients.backward, UNITS)):
        kernel = np.float64(model.layers[-1].kernel)[h : h + UNITS]
        expected = 2 * (ops.convert_to_numpy(model(x)) - y) / y.size @ kernel.T
        t = -1 if h == 0 else 0
        np.testing.assert_allclose(found.h[:, t], expected, rtol=1e-4, atol=1e-7)
    for array in ARRAYS:
        one, other = getattr(gradients.backward, array), getattr(alone, array)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)


def test_unobserved_arrays_have_no_gradient(x, rng):
    class Halved(ScratchLSTMCell):
        def call(self, inputs, states, training=False):
            h, (_, c) = super().call(inputs, states, training)
            return h, [h, 0.5 * c]

    layer = ScratchLSTM(cell=Halved(UNITS))
    y = rng.normal(size=(BATCH, UNITS)).astype("float32")
    layer(x)
    gradients = trace_gradients(layer, x, y, loss="mse")
    assert np.isnan(gradients.c).all()
    assert np.isfinite(gradients.f).all()
    assert not hasattr(gradients, "saturation")
