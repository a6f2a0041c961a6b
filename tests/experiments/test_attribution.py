import sys

import keras
import numpy as np
import pytest
from keras import ops
from models import (
    BATCH,
    FEATURES,
    TIME,
    UNITS,
    apply_dense,
    classifier,
    embed,
    make,
    numpy_lstm,
    sequential,
)
from reference import tensor

from keras_scratch_lstm import ScratchLSTM, attribute

SEVERAL = {"names": ["a", "b", "c"], "statics": ["s", "t"]}


def output(model, x):
    return ops.convert_to_numpy(model(x))


def normalized(layer, rng):
    """A model with `Normalization` in front of the layer."""
    scale = keras.layers.Normalization(mean=rng.normal(size=3), variance=[4, 1, 0.25])
    model = classifier(layer)
    return keras.Sequential([keras.Input((TIME, FEATURES)), scale, *model.layers])


@pytest.fixture
def two_headed():
    """A series, static features, a category and a mask; a mean and quantiles."""
    keras.utils.set_random_seed(4)
    inputs = {
        "series": keras.Input((TIME, FEATURES), name="series"),
        "static": keras.Input((2,), name="static"),
        "shop": keras.Input((), dtype="int32", name="shop"),
        "mask": keras.Input((TIME,), dtype="bool", name="mask"),
    }
    h = ScratchLSTM(UNITS, name="lstm")(inputs["series"], mask=inputs["mask"])
    shop = keras.layers.Embedding(3, 2)(inputs["shop"])
    both = keras.layers.Concatenate()([h, inputs["static"], shop])
    both = keras.layers.Dense(8, activation="tanh")(both)
    names = {"mean": 1, "quantiles": 3}
    outputs = {k: keras.layers.Dense(n, name=k)(both) for k, n in names.items()}
    return keras.Model(inputs, outputs)


@pytest.fixture
def several(rng, draw):
    mask = np.ones((BATCH, TIME), bool)
    mask[1, 4:] = False
    values = {"series": draw(BATCH, TIME, FEATURES), "static": draw(BATCH, 2)}
    return values | {"shop": rng.integers(0, 3, BATCH), "mask": mask}


@pytest.mark.parametrize(
    ("kind", "wrt", "sequences"),
    [("LSTM", -1, False), ("ScratchLSTM", "inputs", True)],
)
def test_scores_add_up_to_the_difference(kind, wrt, sequences, x, rng):
    """Of a baseline that is a tensor, and of weights that change."""
    model = classifier(make(kind, return_sequences=sequences))
    target = (1, 2) if sequences else 2
    for start in (np.float32(0), rng.normal(size=FEATURES).astype("float32")):
        found = attribute(model, x, target=target, baseline=tensor(start), wrt=wrt)
        assert found.scores.shape == x.shape
        at_x, at_start = (
            output(model, inputs)[(slice(None), *np.atleast_1d(target))]
            for inputs in (x, np.broadcast_to(start, x.shape).copy())
        )
        np.testing.assert_allclose(found.difference, at_x - at_start, atol=1e-5)
        np.testing.assert_allclose(found.output, at_x, atol=1e-5)
        np.testing.assert_allclose(found.scores.sum((1, 2)), at_x - at_start, atol=1e-4)
        model.set_weights([1.1 * weight for weight in model.get_weights()])
    if sequences:
        np.testing.assert_array_equal(found.scores[:, 2:], 0)  # later than the output


def test_integrated_gradients_match_a_riemann_sum(x, rng):
    """The path integral, by finite differences in NumPy, of one input."""
    layer = make("LSTM")
    model = normalized(layer, rng)
    mean, variance = (
        ops.convert_to_numpy(v).astype("float64").ravel()
        for v in (model.layers[0].mean, model.layers[0].variance)
    )
    base = x.astype("float64") * [0, 0, 1] + [0.5, -0.5, 0]
    found = attribute(model, x, target=1, baseline=[0.5, -0.5, 9.0], keep=2)
    steps, epsilon, total = 100, 1e-4, 0
    for alpha in (np.arange(steps) + 0.5) / steps:
        ends = []
        for sign in (1, -1):
            at = base + alpha * (x - base)
            at[:, 3, 1] += sign * epsilon
            h = numpy_lstm(layer, (at - mean) / np.sqrt(variance))[1][:, -1]
            ends.append(apply_dense(model, h)[:, 1])
        total += (ends[0] - ends[1]) / (2 * epsilon) / steps
    expected = total * (x - base)[:, 3, 1]
    np.testing.assert_allclose(found.scores[:, 3, 1], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.scores[..., 2], 0)


@pytest.mark.ci
def test_several_baselines_are_averaged(x, draw, seed):
    model = classifier(make("ScratchLSTM"))
    background = draw(2, TIME, FEATURES)
    each = [attribute(model, x, target=0, baseline=one).scores for one in background]
    found = attribute(model, x, target=0, baseline=background)
    np.testing.assert_allclose(found.scores, np.mean(each, axis=0), atol=1e-6)
    at_baselines = output(model, background)[:, 0].mean()
    np.testing.assert_allclose(
        found.difference, output(model, x)[:, 0] - at_baselines, atol=1e-5
    )
    options = {"target": 0, "method": "expected_gradients", "baseline": background}
    options |= {"n_steps": 512, "max_steps": 512, "tolerance": 10.0}
    drawn = attribute(model, x, **options, seed=seed)
    np.testing.assert_allclose(drawn.scores, found.scores, rtol=0.1, atol=0.01)
    np.testing.assert_allclose(drawn.difference, found.difference, atol=1e-6)
    again = attribute(model, x, **options, seed=seed, batch_size=500)
    np.testing.assert_allclose(again.scores, drawn.scores, atol=1e-5)
    other = attribute(model, x, **options, seed=seed + 1)
    assert np.abs(other.scores - drawn.scores).max() > 1e-6


@pytest.mark.parametrize("shape", [(BATCH, TIME, FEATURES), (2, 1, TIME, FEATURES)])
def test_occlusion_matches_predictions(shape, x, rng):
    model = classifier(make("LSTM"))
    baseline = rng.normal(size=shape)
    options = {"target": 1, "method": "occlusion", "keep": 0, "batch_size": 100}
    found = attribute(model, x, baseline=baseline, **options)
    starts = np.broadcast_to(baseline, (2, *x.shape))
    before = model.predict(x, verbose=0)[:, 1]
    for t, k in [(0, 1), (3, 2), (6, 1)]:
        change = 0
        for start in starts:
            changed = x.copy()
            changed[:, t, k] = start[:, t, k]
            change += (before - model.predict(changed, verbose=0)[:, 1]) / 2
        np.testing.assert_allclose(found.scores[:, t, k], change, atol=1e-6)
    np.testing.assert_array_equal(found.scores[..., 0], 0)
    np.testing.assert_array_equal(found.n_steps, 0)


@pytest.mark.parametrize(("fixed", "wrt"), [(False, "inputs"), (True, "lstm")])
def test_saturated_models_get_more_points(fixed, wrt, draw):
    """Gates that switch within a small part of the path."""
    layer = make("LSTM", stateful=fixed, name="lstm")
    layer.set_weights([6 * weight for weight in layer.get_weights()])
    model = classifier(layer, batch_size=BATCH if fixed else None)
    x = draw(BATCH, TIME, FEATURES)
    options = {"target": 1, "baseline": 0.3, "batch_size": 32, "max_steps": 512}
    options |= {"wrt": wrt}
    found = attribute(model, x, n_steps=4, **options)
    at_x, at_start = (output(model, v)[:, 1] for v in (x, np.full_like(x, 0.3)))
    if not fixed:
        np.testing.assert_allclose(found.difference, at_x - at_start, atol=1e-5)
    error = np.abs(found.scores.sum((1, 2)) - found.difference)
    np.testing.assert_allclose(found.error, error, atol=1e-4)
    assert (found.error <= 0.01 * np.abs(found.difference) + 1e-3).all()
    assert found.n_steps.max() > 4
    with pytest.warns(UserWarning, match="of 5 samples do not add up .* max_steps=4"):
        attribute(model, x, n_steps=2, **options | {"max_steps": 4})
    if fixed:
        few = attribute(model, x[:3], n_steps=4, **options)
        assert few.scores.shape == (3, TIME, FEATURES)


@pytest.mark.parametrize(
    ("kind", "method", "wrt"),
    [
        ("LSTM", "occlusion", "lstm"),
        ("ScratchLSTM", "integrated_gradients", "inputs"),
    ],
)
@pytest.mark.ci
def test_masked_time_steps_score_zero(kind, method, wrt, x):
    """A mask stays as it is along the path, also where the baseline is the mask."""
    layers = classifier(make(kind, name="lstm")).layers
    masking = keras.layers.Masking()
    model = keras.Sequential([keras.Input((None, FEATURES)), masking, *layers])
    x[:, 4:] = 0
    for baseline in (0.0, 0.7):
        options = {"target": 1, "baseline": baseline, "method": method, "wrt": wrt}
        found = attribute(model, x, **options)
        plain = keras.Sequential([keras.Input((None, FEATURES)), *layers])
        short = attribute(plain, x[:, :4].copy(), **options)
        np.testing.assert_allclose(found.scores[:, :4], short.scores, atol=1e-5)
        np.testing.assert_allclose(found.scores[:, 4:], 0, atol=1e-6)
        np.testing.assert_allclose(found.difference, short.difference, atol=1e-5)


def test_several_inputs(two_headed, several, x):
    options = {"target": "mean", "keep": {"static": "t"}}
    names = {"series": SEVERAL["names"], "static": SEVERAL["statics"]}
    options |= {"baseline": {"static": [1.0, 5.0]}, "feature_names": names}
    found = attribute(two_headed, several, **options)
    series, static = found.scores["series"], found.scores["static"]
    assert set(found.scores) == {"series", "static"}  # the others have no gradient
    np.testing.assert_array_equal(static[:, 1], 0)
    assert not series[1, 4:].any()
    base = dict(several, series=0 * several["series"], static=several["static"].copy())
    base["static"][:, 0] = 1
    difference = (heads(two_headed, several)[0] - heads(two_headed, base)[0])[:, 0]
    np.testing.assert_allclose(found.difference, difference, atol=1e-5)
    np.testing.assert_allclose(
        series.sum((1, 2)) + static.sum(1), difference, atol=1e-3
    )
    assert {k: v.shape for k, v in found.by_feature().items()} == {
        "series": (FEATURES,),
        "static": (2,),
    }
    assert {k: v.shape for k, v in found.by_step().items()} == {"series": (TIME,)}


def heads(model, inputs):
    return [ops.convert_to_numpy(model(inputs)[k]) for k in ("mean", "quantiles")]


@pytest.mark.parametrize(
    ("target", "heads"),
    [
        (("quantiles", slice(0, 2)), [1, 2]),
        (("quantiles", -1), 3),
        (lambda outputs: outputs["quantiles"][:, 2] - outputs["mean"][:, 0], None),
    ],
)
@pytest.mark.ci
def test_targets(target, heads, two_headed, several):
    found = attribute(two_headed, several, target=target)
    one = np.concatenate(
        list(map(ops.convert_to_numpy, two_headed(several).values())), 1
    )
    expected = one[:, 3] - one[:, 0] if heads is None else one[:, heads]
    np.testing.assert_allclose(found.output, expected, atol=1e-6)
    assert found.difference.shape == found.error.shape == expected.shape
    several_targets = expected.shape[1:]
    assert found.scores["static"].shape == (BATCH, 2, *several_targets)
    total = found.scores["series"].sum((1, 2)) + found.scores["static"].sum(1)
    np.testing.assert_allclose(total, found.difference, atol=1e-3)
    if several_targets:
        alone = attribute(two_headed, several, target=("quantiles", 1))
        np.testing.assert_allclose(
            found.scores["series"][..., 1], alone.scores["series"], atol=1e-4
        )


def test_outputs_by_name_of_a_model_with_a_list_of_outputs(two_headed, several):
    model = keras.Model(two_headed.inputs, list(two_headed.output.values()))
    as_list = [several[tensor.name] for tensor in model.inputs]
    found = attribute(model, as_list, target=("mean", 0), method="occlusion")
    mean, _ = heads(two_headed, several)
    np.testing.assert_allclose(found.output, mean[:, 0], atol=1e-6)


@pytest.mark.ci
def test_tokens_have_the_scores_of_their_embeddings(rng):
    model = sequential(make("ScratchLSTM"), mask_zero=True)
    tokens = rng.integers(1, 9, (BATCH, TIME))
    tokens[:, 5:] = 0
    found = attribute(model, tokens, target=1)
    x = embed(tokens, model)
    np.testing.assert_allclose(found.inputs, x, atol=1e-6)
    assert not found.scores[:, 5:].any()
    layers = keras.Sequential([keras.Input((5, FEATURES)), *model.layers[1:]])
    expected = attribute(layers, x[:, :5], target=1)
    np.testing.assert_allclose(found.scores[:, :5], expected.scores, atol=1e-6)
    with pytest.raises(ValueError, match=r"`wrt` must be an LSTM .*: 'scratch"):
        attribute(model, tokens, target=1, wrt="inputs")


def test_batches_of_different_lengths(x):
    """In both directions."""
    both = keras.layers.Bidirectional(make("LSTM"))
    layers = [keras.Input((None, FEATURES)), *classifier(both).layers]
    model = keras.Sequential(layers)
    found = attribute(model, x[:2, :4], target=0)
    both = attribute(model, iter([(x[2:],), (x[:2, :4],)]), target=0, batches=None)
    np.testing.assert_allclose(both.scores[3:, :4], found.scores, atol=1e-6)
    assert both.scores.shape == x.shape
    assert not both.scores[3:, 4:].any()


class Stations(keras.layers.Layer):
    """Runs an LSTM on each of two stations, folded into the batch."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm, self.built = lstm, True

    def call(self, x):
        h = self.lstm(ops.reshape(x, (-1, TIME, FEATURES)))
        return ops.reshape(h, (-1, 2 * UNITS))


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_models_that_fold_an_axis_into_the_batch(method, draw):
    inputs = keras.Input((2, TIME, FEATURES))
    outputs = keras.layers.Dense(2)(Stations(make("LSTM"))(inputs))
    model, x = keras.Model(inputs, outputs), draw(BATCH, 2, TIME, FEATURES)
    options = {"target": 1, "method": method}
    expected = attribute(model, x, baseline=0.3, **options)
    options |= {"wrt": 0, "baseline": np.full((2 * BATCH, TIME, FEATURES), 0.3)}
    scores = attribute(model, x, **options).scores
    np.testing.assert_allclose(scores.reshape(x.shape), expected.scores, atol=1e-6)
    assert expected.by_step().shape == (2, TIME)


@pytest.mark.one_backend
def test_tables(x, two_headed, several):
    pytest.importorskip("pandas")
    model = classifier(make("LSTM"))
    names = SEVERAL["names"]
    found = attribute(model, x, target=0, feature_names=names)
    table = found.to_dataframe()
    assert list(table.columns) == ["sample", "step", "feature", "score"]
    row = table.query("sample == 2 and step == 3 and feature == 'b'")
    assert row.score.item() == found.scores[2, 3, 1]
    by_feature = table.groupby(["sample", "feature"]).score.sum().abs()
    by_feature = by_feature.groupby("feature").mean()
    np.testing.assert_allclose(found.by_feature(), by_feature, 1e-5, 1e-6)
    by_step = table.groupby(["sample", "step"]).score.sum().abs()
    by_step = by_step.groupby("step").mean()
    np.testing.assert_allclose(found.by_step(), by_step, 1e-5, 1e-6)
    found = attribute(two_headed, several, target="quantiles")
    table = found.to_dataframe()
    assert {"input", "sample", "step", "feature", "target", "score"} == set(table)
    static = table.query("input == 'static'")
    assert static.step.isna().all()
    row = static.query("sample == 1 and feature == 'static 1' and target == 2")
    assert row.score.item() == found.scores["static"][1, 1, 2]
    assert found.by_step()["series"].shape == (TIME, 3)


@pytest.mark.one_backend
def test_explanation_of_shap(x, monkeypatch):
    model, names = classifier(make("LSTM")), SEVERAL["names"]
    found = attribute(model, x, target=0, feature_names=names)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "shap", None)
        with pytest.raises(ImportError, match="`to_shap` needs shap: run `pip insta"):
            found.to_shap()
    pytest.importorskip("shap", reason="shap is not installed")
    explanation = found.to_shap()
    assert explanation.feature_names[4] == "b[1]"
    np.testing.assert_array_equal(explanation.values[:, 4], found.scores[:, 1, 1])
    np.testing.assert_array_equal(explanation.data[:, 4], x[:, 1, 1])
    total = explanation.base_values + explanation.values.sum(axis=1)
    np.testing.assert_allclose(total, found.output, atol=1e-3)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 3}, r"`target` must be an index .* one sample's .* \(3,\)"),
        ({"target": True}, "`target` must be an index .* Received: target=True"),
        ({"target": slice(3, 9)}, "`target` must be .* selects some of 3"),
        ({"target": lambda y: 1.0}, "`target` must be a function that returns a tens"),
        ({"n_steps": 0}, "`n_steps` must be a positive integer"),
        ({"method": "saliency"}, "`method` must be one of 'integrated_gradients', "),
        ({"baseline": [1.0] * 2}, r"`baseline` must be .* \(5, 7, 3\)"),
        ({"baseline": np.nan}, "`baseline` must be a finite number"),
        ({"keep": "a"}, "`keep` must be .* selects some of 3"),
        ({"keep": {"x": 0}}, "`keep` must be a dict of input name"),
        ({"feature_names": ["a"]}, "`feature_names` must be a list of 3 names"),
        ({"wrt": "dense"}, "`wrt` must be the name or index of an LSTM .* `wrt=` to"),
    ],
)
def test_invalid_arguments(options, message, x):
    with pytest.raises(ValueError, match=message):
        attribute(classifier(make("LSTM")), x, **{"target": 0} | options)


@pytest.mark.one_backend
def test_inputs_must_be_finite(x, two_headed, several):
    x[0, 2] = np.nan
    for wrt in ("inputs", 0):
        with pytest.raises(
            ValueError, match=r"`inputs` must be finite\. Received: NaN"
        ):
            attribute(classifier(make("LSTM")), x, target=0, wrt=wrt)
    with pytest.raises(ValueError, match=r"`baseline` must be a dict .* 'series', 'st"):
        attribute(two_headed, several, target="mean", baseline=[1.0, 2.0])
    with pytest.raises(ValueError, match="`target` must be a name of 'mean', 'quant"):
        attribute(two_headed, several, target=0)
