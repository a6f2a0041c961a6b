import keras
import numpy as np
import pytest
from edit_reference import (
    ARRAYS,
    BATCH,
    FEATURES,
    LAYERS,
    TIME,
    UNITS,
    apply_dense,
    classifier,
    make,
    numpy_lstm,
)
from gradients import double_precision
from keras import ops

from keras_scratch_lstm import trace_gradients

EPSILON = 1e-5


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_gradients_equal_finite_differences(kind, backwards, rng, dtype_policy):
    dtype_policy("float64")
    x = rng.normal(size=(BATCH, TIME, FEATURES))
    y = rng.normal(size=(BATCH, TIME, UNITS))
    mask = np.ones((BATCH, TIME), bool)
    mask[0, 2] = False
    with double_precision():
        options = {"go_backwards": backwards, "return_sequences": True}
        layer = make(kind, **options)
        # On JAX, Keras's tanh computes in float32.
        layer.cell.activation = lambda x: 2 * ops.sigmoid(2 * x) - 1
        inputs = [keras.Input((TIME, FEATURES), dtype="float64")]
        inputs.append(keras.Input((TIME,), dtype="bool"))
        model = keras.Model(inputs, layer(inputs[0], mask=inputs[1]))
        # Keras's `matmul` and `mean`, and so `Dense` and losses, compute in float32.
        gradients = trace_gradients(
            model, [x, mask], y, loss=lambda y, h: ops.sum((h - y) ** 2)
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

                _, h = numpy_lstm(layer, x, edit, mask=mask)
                return np.sum((h - y) ** 2)

            expected = (loss(EPSILON) - loss(-EPSILON)) / (2 * EPSILON)
            actual = getattr(gradients, name)[sample, t, unit]
            assert actual == pytest.approx(expected, rel=1e-6, abs=1e-8)


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


def test_compiled_loss_and_later_layers(x, rng):
    """The gradient goes through a second LSTM; the compiled loss is the default."""
    y = rng.integers(3, size=BATCH)
    layers = make("LSTM", return_sequences=True), keras.layers.LSTM(UNITS)
    head = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((TIME, FEATURES)), *layers, head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss)
    gradients = trace_gradients(model, x, y, layer=0)
    expected = trace_gradients(model, x, y, loss=loss, layer=0)
    np.testing.assert_allclose(gradients.h, expected.h, rtol=1e-5, atol=1e-8)
    assert (gradients.h[:, -1] != 0).all()


@pytest.mark.one_backend
def test_missing_loss(x):
    with pytest.raises(
        ValueError, match=r"`loss` must be given, since .* not compiled"
    ):
        trace_gradients(classifier(make("LSTM")), x, x)
