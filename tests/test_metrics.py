import keras
import numpy as np
import pytest
from reference import cross_entropy

from keras_scratch_lstm import Perplexity, ScratchLSTM

VOCABULARY = 11


def value(metric):
    return float(keras.ops.convert_to_numpy(metric.result()))


def perplexity(y_true, y_pred, sample_weight=None, **arguments):
    metric = Perplexity(**arguments)
    metric.update_state(y_true, y_pred, sample_weight)
    return value(metric)


def random_tokens(rng, *shape):
    """Tokens and logits."""
    logits = rng.normal(size=(*shape, VOCABULARY)).astype("float32")
    return rng.integers(0, VOCABULARY, shape), logits


@pytest.mark.parametrize(
    ("kind", "ignore_class", "from_logits"),
    [
        ("none", None, True),
        ("sample", -1, True),
        ("column", 4, False),
    ],
)
def test_exact_over_batches_of_different_sizes(rng, kind, ignore_class, from_logits):
    metric = Perplexity(from_logits=from_logits, ignore_class=ignore_class)
    total = tokens = 0
    for shape in [(4, 7), (3, 2), (2, 30), (9,)]:
        y_true, logits = random_tokens(rng, *shape)
        if ignore_class == -1:
            y_true = np.where(rng.random(shape) < 0.3, -1, y_true)
        w = rng.uniform(0, 2, shape) * (rng.random(shape) < 0.8)
        if kind == "none":
            w, sample_weight = np.ones(shape), None
        elif len(shape) == 1:
            sample_weight = w
        else:
            sample_weight = w[:, :1] if kind == "column" else w[:, 0]
            w = np.broadcast_to(w[:, :1], shape)
        y_pred = logits
        if not from_logits:
            y_pred = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        metric.update_state(y_true, y_pred, sample_weight)
        w = w * (y_true != ignore_class)
        total += (cross_entropy(np.maximum(y_true, 0), logits) * w).sum()
        tokens += w.sum()
    np.testing.assert_allclose(value(metric), np.exp(total / tokens), rtol=1e-5)
    metric.reset_state()
    assert value(metric) == 0


def test_predictions_with_zero_weight_may_be_nan(rng):
    y_true, logits = random_tokens(rng, 2, 3)
    expected = np.exp(cross_entropy(y_true, logits)[:, :2].mean())
    logits[:, 2] = np.nan
    actual = perplexity(y_true, logits, [[1, 1, 0]] * 2)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_long_epochs_are_exact():
    """A plain float32 sum stops growing at 2**24 tokens."""
    metric = Perplexity()
    y_true = np.zeros((1, 1), "int32")
    large, small = 2.0**25, 1.0
    for logits, weight, times in [([3.0, 0.0], large, 1), ([0.0, 1.0], small, 200)]:
        for _ in range(times):
            metric.update_state(y_true, np.array([[logits]], "float32"), [weight])
    nll = np.log1p(np.exp(-3.0)), np.log1p(np.exp(1.0))
    expected = np.exp((large * nll[0] + 200 * nll[1]) / (large + 200))
    np.testing.assert_allclose(value(metric), expected, rtol=3e-7)


@pytest.mark.parametrize("method", ["fit", "evaluate with weights"])
def test_masks_and_smaller_last_batch(rng, method):
    weighted = method == "evaluate with weights"
    if weighted and keras.backend.backend() == "torch":
        pytest.skip("Keras's loss changes masked weights in place on torch")
    x, y = rng.integers(1, VOCABULARY, (2, 37, 6), "int32")  # JAX 0.12 warns of int64
    lengths = rng.integers(1, 7, (37, 1))
    if method == "fit" and keras.backend.backend() == "jax":
        lengths[:] = 6  # `fit` on JAX does not pass the mask to metrics
    x[np.arange(6) >= lengths] = 0
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Embedding(VOCABULARY, 4, mask_zero=True),
            ScratchLSTM(5, return_sequences=True),
            keras.layers.Dense(VOCABULARY, kernel_initializer="random_normal"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    where = "weighted_metrics" if weighted else "metrics"
    model.compile(keras.optimizers.SGD(0.0), loss, **{where: [Perplexity()]})
    w = rng.uniform(0, 2, (37, 6)).astype("float32") if weighted else None
    arguments = {"sample_weight": w, "batch_size": 8, "verbose": 0}
    if method == "fit":
        stop = keras.callbacks.EarlyStopping(monitor="perplexity", patience=0)
        logs = model.fit(x, y, callbacks=[stop], **arguments).history
        assert stop.monitor_op(0, 1)  # lower is better
    else:
        logs = model.evaluate(x, y, return_dict=True, **arguments)
    logits = keras.ops.convert_to_numpy(model(x))
    weights = (np.arange(6) < lengths) * (w if weighted else 1)
    expected = np.exp((cross_entropy(y, logits) * weights).sum() / weights.sum())
    np.testing.assert_allclose(logs["perplexity"], expected, rtol=1e-5)


def test_configuration_round_trip():
    metric = Perplexity("p", from_logits=False, ignore_class=3, dtype="float32")
    config = metric.get_config()
    assert Perplexity.from_config(config).get_config() == config
    assert config["ignore_class"] == 3
    name = keras.saving.get_registered_name(Perplexity)
    assert name == "keras_scratch_lstm>Perplexity"


# Some would become valid tokens when cast to int32.
INVALID = [-1, VOCABULARY, 2**32 + 1, np.uint64(2**63 + 1), np.float16(1.5)]
INVALID += [-0.5, 2.0**32 + 1, np.inf, np.nan]


@pytest.mark.parametrize("target", INVALID, ids=repr)
def test_invalid_targets_are_nan(rng, target):
    """As arrays, and as tensors where these have the dtype."""
    y_true = np.array([2, target], np.array(target).dtype)
    logits = rng.normal(size=(2, VOCABULARY)).astype("float32")
    (expected,) = np.exp(cross_entropy(np.array([2]), logits[:1]))
    missing = {"jax": "64", "torch": "uint64"}.get(keras.backend.backend(), "none")
    has_tensor = missing not in y_true.dtype.name
    tensors = [keras.ops.convert_to_tensor(y_true)] if has_tensor else []
    for given in (y_true, *tensors):
        metric = Perplexity()
        metric.update_state(given, logits, [1, 0])  # the second token is not counted
        assert value(metric) == pytest.approx(expected, rel=1e-5)
        metric.update_state(given, logits)
        assert np.isnan(value(metric))


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32"])
def test_valid_targets_of_every_dtype(rng, dtype):
    vocabulary = 300
    y_true = rng.integers(0, 100, (2, 3))
    logits = rng.normal(size=(2, 3, vocabulary)).astype("float32")
    expected = np.exp(cross_entropy(y_true, logits).mean())
    for y in (y_true.astype(dtype), y_true.tolist()):
        actual = perplexity(y, logits, ignore_class=-100)
        assert actual == pytest.approx(expected, rel=1e-5)


def test_zero_probabilities_are_a_uniform_guess():
    y_pred = np.array([[0, 0, 0, 0], [0.5, 0.25, 0.25, 0]], "float32")
    actual = perplexity(np.array([2, 1]), y_pred, from_logits=False)
    assert actual == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_counts_beyond_its_range(dtype):
    y_true = np.zeros((1, 70_000), "int32")
    logits = np.zeros((1, 70_000, 3), "float32")
    assert perplexity(y_true, logits, dtype=dtype) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("ignore_class", ["pad", 1.5, True, 2**70])
def test_invalid_arguments(ignore_class):
    message = (
        f"`ignore_class` must be an integer .*Received: ignore_class={ignore_class!r}"
    )
    with pytest.raises(ValueError, match=message):
        Perplexity(ignore_class=ignore_class)


@pytest.mark.parametrize(
    ("y_true", "sample_weight", "message"),
    [
        ((4, 6), (), r"same shape up until the last dim.*\(?4, 6"),
        ((4, 7), (4, 7, 5), "[Ss]hape|size|broadcast"),
    ],
)
def test_wrong_shapes_raise_the_error_of_keras_or_the_backend(
    y_true, sample_weight, message
):
    metric, weights = Perplexity(), np.ones(sample_weight, "float32")
    with pytest.raises(Exception, match=message):
        metric.update_state(np.zeros(y_true, "int32"), np.zeros((4, 7, 5)), weights)
    assert value(metric) == 0
