import keras
import numpy as np
import pytest
from reference import cross_entropy

from keras_scratch_lstm import Perplexity

VOCABULARY = 11


def value(metric):
    return float(keras.ops.convert_to_numpy(metric.result()))


def ragged_batches(rng):
    """Batches of other sizes and lengths, with weights for tokens."""
    for batch, time in [(4, 7), (1, 7), (3, 2), (5, 1), (2, 30)]:
        y_true = rng.integers(0, VOCABULARY, (batch, time))
        logits = 3 * rng.normal(size=(batch, time, VOCABULARY)).astype("float32")
        weights = rng.uniform(0, 2, (batch, time)) * (rng.random((batch, time)) < 0.8)
        yield y_true, logits, weights.astype("float32")


def weighing(kind, y_true, weights):
    """The `sample_weight` of a kind, and what it means for each token."""
    if kind == "none":
        return None, np.ones(y_true.shape)
    if kind == "token":
        return weights, weights
    sample = weights[:, :1]
    return (sample if kind == "column" else sample[:, 0]), sample * np.ones(
        y_true.shape
    )


@pytest.mark.parametrize("kind", ["none", "token", "sample", "column"])
@pytest.mark.parametrize("ignore_class", [None, 4, -1])
@pytest.mark.parametrize("from_logits", [True, False])
def test_exact_over_ragged_batches(rng, kind, ignore_class, from_logits):
    metric = Perplexity(from_logits=from_logits, ignore_class=ignore_class)
    losses, counted = [], []
    for y_true, logits, weights in ragged_batches(rng):
        if not from_logits:
            logits = logits / 3  # Keras clips probabilities below 1e-7
        if ignore_class == -1:
            y_true = np.where(rng.random(y_true.shape) < 0.3, -1, y_true)
        sample_weight, w = weighing(kind, y_true, weights)
        y_pred = logits
        if not from_logits:
            y_pred = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        metric.update_state(y_true, y_pred, sample_weight)
        ignored = y_true == ignore_class
        losses.append(cross_entropy(np.where(ignored, 0, y_true), logits).ravel())
        counted.append((w * ~ignored).ravel())
    losses, counted = map(np.concatenate, (losses, counted))
    expected = np.exp((losses * counted).sum() / counted.sum())
    np.testing.assert_allclose(value(metric), expected, rtol=1e-5)
    # A mean of the batches' perplexities is another number.
    metric.reset_state()
    assert value(metric) == 0


def test_one_prediction_a_sample(rng):
    y_true = rng.integers(0, VOCABULARY, 9)
    logits = rng.normal(size=(9, VOCABULARY)).astype("float32")
    expected = np.exp(cross_entropy(y_true, logits).mean())
    for y in (y_true, y_true[:, None]):
        metric = Perplexity()
        metric.update_state(y, logits)
        np.testing.assert_allclose(value(metric), expected, rtol=1e-5)


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary(rng):
    metric = Perplexity()
    y_true = rng.integers(0, 28, (4, 5))
    metric.update_state(y_true, np.zeros((4, 5, 28), "float32"))
    np.testing.assert_allclose(value(metric), 28, rtol=1e-6)


def test_what_does_not_count_may_hold_anything(rng):
    y_true = rng.integers(0, VOCABULARY, (2, 3))
    logits = rng.normal(size=(2, 3, VOCABULARY)).astype("float32")
    expected = np.exp(cross_entropy(y_true, logits)[:, :2].mean())
    logits[:, 2] = np.nan
    metric = Perplexity()
    metric.update_state(y_true, logits, sample_weight=[[1, 1, 0]] * 2)
    np.testing.assert_allclose(value(metric), expected, rtol=1e-5)


def test_long_epochs_stay_exact():
    """float32 alone is stuck at 2**24 tokens; the totals here go beyond."""
    metric = Perplexity()
    y_true = np.zeros((1, 1), "int32")
    large, small = 2.0**25, 1.0
    for logits, weight, times in [([3.0, 0.0], large, 1), ([0.0, 1.0], small, 3000)]:
        for _ in range(times):
            metric.update_state(y_true, np.array([[logits]], "float32"), [weight])
    nll = np.log1p(np.exp(-3.0)), np.log1p(np.exp(1.0))
    tokens = float(metric._tokens[0]) - float(metric._tokens[1])
    assert tokens == pytest.approx(large + 3000, abs=2)  # 2: half a float32 step
    expected = np.exp((large * nll[0] + 3000 * nll[1]) / (large + 3000))
    np.testing.assert_allclose(value(metric), expected, rtol=3e-7)


def masked_model(**compile_arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Embedding(VOCABULARY, 4, mask_zero=True),
            keras.layers.LSTM(5, return_sequences=True),
            keras.layers.Dense(VOCABULARY, kernel_initializer="random_normal"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, **compile_arguments)
    return model


@pytest.mark.parametrize(
    "weighted",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                keras.backend.backend() == "torch",
                reason="Keras's loss changes masked weights in place on torch",
            ),
        ),
    ],
)
def test_in_evaluate_with_masks_and_a_ragged_last_batch(rng, weighted):
    x = rng.integers(1, VOCABULARY, (37, 6))
    lengths = rng.integers(1, 7, (37, 1))
    x[np.arange(6) >= lengths] = 0
    y = rng.integers(0, VOCABULARY, (37, 6))
    w = rng.uniform(0, 2, (37, 6)).astype("float32") if weighted else None
    where = "weighted_metrics" if weighted else "metrics"
    model = masked_model(**{where: [Perplexity()]})
    logs = model.evaluate(
        x, y, sample_weight=w, batch_size=8, verbose=0, return_dict=True
    )
    logits = keras.ops.convert_to_numpy(model(x))
    weights = (np.arange(6) < lengths) * (w if weighted else 1)
    losses = cross_entropy(y, logits)
    expected = np.exp((losses * weights).sum() / weights.sum())
    np.testing.assert_allclose(logs["perplexity"], expected, rtol=1e-5)


def test_in_fit_with_a_ragged_last_batch(rng):
    x = rng.integers(1, VOCABULARY, (37, 6))
    y = rng.integers(0, VOCABULARY, (37, 6))
    model = masked_model(metrics=[Perplexity()])
    history = model.fit(x, y, batch_size=8, verbose=0).history
    logits = keras.ops.convert_to_numpy(model(x))  # the learning rate is 0
    expected = np.exp(cross_entropy(y, logits).mean())
    np.testing.assert_allclose(history["perplexity"], [expected], rtol=1e-5)


def test_the_configuration_comes_back():
    metric = Perplexity("p", from_logits=False, ignore_class=3, dtype="float32")
    config = metric.get_config()
    again = Perplexity.from_config(config)
    assert again.get_config() == config
    assert config["ignore_class"] == 3
    assert keras.saving.get_registered_name(Perplexity) == (
        "keras_scratch_lstm>Perplexity"
    )


@pytest.mark.parametrize(
    ("y_true", "y_pred", "sample_weight", "message"),
    [
        ((4, 7), (4, 6, 5), None, r"`y_true` has the shape \(4, 7\); .* \(4, 6\)"),
        ((4, 7, 5), (4, 7, 5), None, r"`y_true` has the shape \(4, 7, 5\)"),
        ((4,), (4, 7, 5), None, r"`y_true` has the shape \(4,\)"),
        ((4, 7), (4, 7, 5), (3,), r"`sample_weight` has the shape \(3, 1\)"),
        ((4, 7), (4, 7, 5), (4, 6), r"`sample_weight` has the shape \(4, 6\)"),
    ],
)
def test_wrong_shapes(y_true, y_pred, sample_weight, message):
    metric = Perplexity()
    weight = None if sample_weight is None else np.ones(sample_weight, "float32")
    with pytest.raises(ValueError, match=message):
        metric.update_state(np.zeros(y_true, "int32"), np.zeros(y_pred), weight)
    assert value(metric) == 0
