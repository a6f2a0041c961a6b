import csv
import itertools
import re

import keras
import numpy as np
import pytest
from keras import ops
from models import LAYERS
from reference import NAMES, cross_entropy, weights_of

from keras_scratch_lstm import (
    GateMonitor,
    Perplexity,
    PerplexityLogger,
    callbacks,
    trace_gates,
)

TIME, FEATURES, VOCABULARY = 5, 3, 11
BACKEND = keras.backend.backend()
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SIDES = "left", "right"
SATURATION = [f"lstm/{gate}_{side}_saturated" for gate in "ifo" for side in SIDES]


def fit(model, *data, callbacks=(), **arguments):
    callbacks = list(callbacks) or [PerplexityLogger(verbose=0)]
    return model.fit(*data, callbacks=callbacks, verbose=0, **arguments).history


# --- PerplexityLogger --------------------------------------------------------


def build(metrics=(), time=TIME, loss=CROSS_ENTROPY, activation=None, **arguments):
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense(VOCABULARY, activation, **arguments)
    model = keras.Sequential([keras.Input((time, FEATURES)), dense])
    model.compile("sgd", loss, metrics=list(metrics))
    return model


@pytest.fixture
def data(rng):
    x = rng.normal(size=(37, TIME, FEATURES)).astype("float32")
    return x, rng.integers(0, VOCABULARY, (37, TIME))


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances by a second each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.parametrize(
    ("loss", "logits", "loss_weights"),
    [
        (CROSS_ENTROPY, True, 3.0),
        ("sparse_categorical_crossentropy", False, None),
    ],
    ids=["logits", "string"],
)
def test_perplexity_matches_metric(data, loss, logits, loss_weights):
    metric = Perplexity(name="exact", from_logits=logits)
    model = build(activation=None if logits else "softmax")
    model.compile("sgd", loss, loss_weights, metrics=[metric])
    logs = fit(model, *data, validation_data=data, batch_size=8, epochs=2)
    for prefix in ("", "val_"):
        expected = logs[f"{prefix}exact"]
        np.testing.assert_allclose(logs[f"{prefix}perplexity"], expected, rtol=1e-5)


def test_perplexity_of_model_takes_precedence(data):
    # An accuracy of that name is at most 1, unlike the exponential of a loss.
    model = build([keras.metrics.SparseCategoricalAccuracy(name="perplexity")])
    history = fit(model, *data, validation_data=data)
    assert history["perplexity"][0] <= 1 < np.exp(history["loss"][0])
    own = model.evaluate(*data, verbose=0, return_dict=True)
    assert history["val_perplexity"][0] == pytest.approx(own["perplexity"])


def test_perplexity_of_each_output_with_cross_entropy(data):
    x, y = data
    one_hot = np.eye(VOCABULARY, dtype="float32")
    losses = {
        "next": CROSS_ENTROPY,
        "tag": keras.losses.CategoricalCrossentropy(from_logits=True),
        "smooth": keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        "total": keras.losses.SparseCategoricalCrossentropy(reduction="sum"),
        "value": "mse",
    }
    inputs = keras.Input((TIME, FEATURES))
    outputs = {
        name: keras.layers.Dense(VOCABULARY, kernel_regularizer="l2", name=name)(inputs)
        for name in losses
    }
    model = keras.Model(inputs, outputs)
    targets = {"next": y, "tag": one_hot[y[::-1]], "total": y}
    targets |= dict.fromkeys(("smooth", "value"), one_hot[y])
    weights = {name: 0.1 + k for k, name in enumerate(losses)}
    model.compile(keras.optimizers.SGD(0.0), losses, loss_weights=weights)
    # On TensorFlow, Keras weights smaller batches like others in these losses.
    history = fit(model, x, targets, batch_size=37, validation_data=(x, targets))
    predictions = model.predict(x, verbose=0)
    for name, tokens in (("next", y), ("tag", y[::-1])):
        expected = np.exp(cross_entropy(tokens, predictions[name]).mean())
        for prefix in ("", "val_"):
            value = history.pop(f"{prefix}{name}_perplexity")
            assert value == [pytest.approx(expected, rel=1e-5)]
    assert not [name for name in history if "perplexity" in name]


def test_perplexity_of_only_output_with_a_loss(data):
    x, y = data
    inputs = keras.Input((TIME, FEATURES))
    outputs = [keras.layers.Dense(VOCABULARY, name=name)(inputs) for name in "ab"]
    model = keras.Model(inputs, outputs)
    model.get_layer("a").trainable = False
    model.compile(keras.optimizers.SGD(0.0), [None, CROSS_ENTROPY])
    expected = np.exp(cross_entropy(y, model.predict(x, verbose=0)[1]).mean())
    assert fit(model, x, [y, y])["b_perplexity"] == [pytest.approx(expected, rel=1e-5)]


class Halved(keras.losses.SparseCategoricalCrossentropy):
    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) / 2


@pytest.mark.parametrize(
    "loss",
    [Halved(from_logits=True), lambda y_true, y_pred: ops.mean(y_pred**2)],
    ids=["subclass", "function"],
)
def test_no_perplexity_of_other_losses(data, loss):
    logger = PerplexityLogger(verbose=0)
    history = fit(build(loss=loss), *data, validation_data=data, callbacks=[logger])
    assert sorted(history) == ["loss", "tokens_per_sec", "val_loss"]
    assert logger.closing_line.startswith(f"loss {history['loss'][-1]:.1f}, ")


class WithAuxiliaryLoss(keras.Sequential):
    def compute_loss(self, *args, **kwargs):
        return 1 + super().compute_loss(*args, **kwargs)


def test_penalties_in_the_loss_warn(data):
    auxiliary = WithAuxiliaryLoss(build().layers)
    auxiliary.compile("sgd", CROSS_ENTROPY)
    for model in (build(kernel_regularizer="l2"), auxiliary):
        with pytest.warns(UserWarning, match=r"metrics=\[Perplexity\(\)\]"):
            history = fit(model, *data)
        assert "perplexity" not in history
    # With the metric, there is no warning, which would be an error.
    fit(build([Perplexity()], kernel_regularizer="l2"), *data)


def test_overflow_is_infinite_perplexity(data):
    bias = 1e4 * np.arange(VOCABULARY)
    model = build(bias_initializer=keras.initializers.Constant(bias))
    model.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    assert fit(model, data[0], 0 * data[1])["perplexity"] == [np.inf]


@pytest.mark.parametrize("counted", [False, True], ids=["", "counted by a metric"])
def test_tokens_and_seconds(data, clock, counted):
    logger = PerplexityLogger(verbose=0)
    arguments = {"epochs": 2, "batch_size": 8, "callbacks": [logger]}
    tokens = 37 * TIME
    if counted:
        model = build([Perplexity(ignore_class=0)], time=None)
        arguments["validation_data"] = data
        tokens = np.sum(data[1] != 0)
    else:
        model = build()
    history = fit(model, *data, **arguments)
    # From the epoch's start to the end of training, the clock is read once.
    assert history["tokens_per_sec"] == [tokens, tokens]
    # Two epochs: each a start, the end of training, and the end.
    assert logger.seconds == 5
    assert logger.tokens_per_sec == 2 * tokens / 5


def test_tokens_of_batches_of_different_lengths(rng, clock):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, k):
            batch, time = [(8, 5), (3, 7), (1, 2)][k]
            y = np.zeros((batch, time), "int32")
            return np.ones((batch, time, FEATURES)), (y[:, 0], y)

    inputs = keras.Input((None, FEATURES))
    hidden = keras.layers.Dense(VOCABULARY)(inputs)
    pooled = keras.layers.GlobalMaxPooling1D()(hidden)
    model = keras.Model(inputs, [pooled, hidden])
    for _ in range(2):
        model.compile("sgd", [None, CROSS_ENTROPY], metrics=[None, Perplexity()])
        for _ in range(2):
            history = fit(model, Batches(), epochs=2)
            assert history["tokens_per_sec"] == [8 * 5 + 3 * 7 + 1 * 2] * 2


def test_model_is_as_it_was_after_fit(data):
    """Two models, of which one is trained with the callback, are equal afterwards."""

    def state(model):
        attributes = {name: type(value) for name, value in vars(model).items()}
        variables = {v.path: numpy(v) for m in model.metrics for v in m.variables}
        variables |= {v.path: numpy(v) for v in model.variables}
        return attributes, variables, model.train_function

    numpy, models = ops.convert_to_numpy, []
    for callback in (PerplexityLogger(verbose=0), keras.callbacks.Callback()):
        accuracy = keras.metrics.SparseCategoricalAccuracy()
        models.append(build([accuracy, Perplexity()]))
        fit(models[-1], *data, callbacks=[callback])
        assert "compute_metrics" not in vars(models[-1])
        trained = models[-1].train_function
        fit(models[-1], *data, callbacks=[callback])
        assert models[-1].train_function is trained  # not compiled again
    (attributes, variables, _), (expected, values, _) = map(state, models)
    assert attributes == expected
    assert len(variables) == len(values) > 8
    for one, other in zip(variables.values(), values.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_epoch_ends_when_the_device_has_finished(data, monkeypatch):
    """The counter is the last thing that an epoch computes."""
    now, read = [0.0], ops.convert_to_numpy

    def wait(tensor):
        now[0] = 2.0
        return read(tensor)

    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(callbacks.ops, "convert_to_numpy", wait)
    assert fit(build(), *data)["tokens_per_sec"] == [37 * TIME / 2]


@pytest.mark.one_backend
def test_unknown_number_of_tokens_warns(data):
    class Model(keras.Sequential):
        def train_step(self, data):
            return {"loss": ops.zeros(())}

    custom = Model(build().layers)
    custom.compile("sgd", CROSS_ENTROPY)
    for model in (custom, build(time=None)):
        logger = PerplexityLogger(verbose=0)
        with pytest.warns(UserWarning, match=r"Compile the model with `metrics="):
            assert "tokens_per_sec" not in fit(model, *data, callbacks=[logger])
        assert logger.tokens_per_sec is None


def test_closing_line(data, capsys):
    logger, model = PerplexityLogger(), build()
    model.evaluate(*data, verbose=0, callbacks=[logger])  # without `fit`
    history = fit(model, *data, epochs=2, callbacks=[logger])
    assert capsys.readouterr().out.strip() == logger.closing_line
    line = r"perplexity (\d+\.\d), (\d+\.\d) tokens/sec on /(CPU|GPU|TPU):\d+"
    perplexity, speed, _ = re.fullmatch(line, logger.closing_line).groups()
    assert perplexity == f"{history['perplexity'][-1]:.1f}"
    assert speed == f"{logger.tokens_per_sec:.1f}"


# --- GateMonitor -------------------------------------------------------------


@pytest.fixture
def series(rng):
    x = rng.normal(size=(16, TIME, FEATURES)).astype("float32")
    return 3 * x, np.float32(rng.normal(size=(16, 1)))


def stack(*layers, batch_size=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(batch_shape=(batch_size, TIME, FEATURES))
    model = keras.Sequential([inputs, *layers, keras.layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=BACKEND == "tensorflow")
    return model


@pytest.mark.parametrize("kind", ["LSTM", "custom cell"])
def test_monitor_logs_saturation_and_weight_norms(kind, series):
    layer = LAYERS[kind](name="lstm")
    model = stack(layer)
    norms = []  # at the end of each epoch
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: norms.append(
            {k: np.linalg.norm(w) for k, w in weights_of(layer.cell).items()}
        )
    )
    monitor = GateMonitor(series[0][:3])
    history = fit(model, *series, epochs=3, callbacks=[monitor, record])
    assert set(history) == {"loss", *SATURATION, *(f"lstm/{k}_norm" for k in norms[0])}
    trace = trace_gates(model, series[0][:3])
    for gate in "ifo":
        values = getattr(trace, gate)
        for side, saturated in (("left", values < 0.1), ("right", values > 0.9)):
            value = history[f"lstm/{gate}_{side}_saturated"][-1]
            assert value == pytest.approx(saturated.mean())
    for name in norms[0]:
        expected = [each[name] for each in norms]
        assert history[f"lstm/{name}_norm"] == pytest.approx(expected, rel=1e-5)
        assert len(set(expected)) == 3  # they change during training


def test_monitor_selects_layers_and_metrics(series):
    lower = LAYERS["LSTM"](name="lower", return_sequences=True)
    upper = LAYERS["ScratchLSTM"](name="upper")
    upper = keras.layers.Bidirectional(upper, name="upper")
    model = stack(lower, upper)
    lstms = {"lower": lower, "forward_upper": upper.forward_layer}
    lstms["backward_upper"] = upper.backward_layer

    def run_in_a_loop(monitor):
        """As in a custom training loop."""
        logs = {}
        monitor.set_model(model)
        monitor.on_train_begin()
        monitor.on_epoch_end(0, logs)
        monitor.on_train_end()
        return logs

    for layer, expected in (
        (None, ["lower", "forward_upper", "backward_upper"]),
        (lower, ["lower"]),
        (["lower", "backward_upper"], ["lower", "backward_upper"]),
        ("upper", ["forward_upper", "backward_upper"]),
    ):
        logs = run_in_a_loop(GateMonitor(series[0], layer, metrics=("weight_norms",)))
        assert set(logs) == {
            f"{name}/{weight}_norm" for name in expected for weight in NAMES
        }
        for name in expected:
            norm = np.linalg.norm(weights_of(lstms[name].cell)["b_f"])
            assert logs[f"{name}/b_f_norm"] == pytest.approx(norm)
    logs = run_in_a_loop(GateMonitor(series[0], lower, metrics=["saturation"]))
    assert set(logs) == {name.replace("lstm/", "lower/") for name in SATURATION}


def test_monitor_keeps_probe_of_dataset(series):
    model = stack(LAYERS["ScratchLSTM"](name="lstm"))
    x, y = series
    probes = [x[:3], iter([(x[:3], y[:3]), (x[3:], y[3:])])]
    model.optimizer.learning_rate = 0.0
    first, second = (
        fit(model, *series, epochs=2, callbacks=[GateMonitor(probe)])
        for probe in probes
    )
    assert {**first, "loss": 0} == {**second, "loss": 0}


def test_monitor_does_not_change_training(series):
    losses, states = [], []
    for monitors in ([PerplexityLogger(0)], [GateMonitor(series[0][:8])]):
        keras.utils.set_random_seed(1)
        layer = LAYERS["ScratchLSTM"](stateful=True, dropout=0.3, seed=1)
        model = stack(layer, batch_size=8)
        model.run_eagerly = False
        arguments = {"batch_size": 8, "epochs": 2, "shuffle": False}
        losses.append(fit(model, *series, callbacks=monitors, **arguments)["loss"])
        states.append([ops.convert_to_numpy(state) for state in layer.states])
    np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(*states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": "saturation"}, "`metrics` must be a list .*'weight_norms'"),
        ({"metrics": 5}, "Received: metrics=5"),
        ({"probe": np.zeros((0, TIME, FEATURES))}, "`probe` must be"),
        ({"layer": "middle"}, "`layer` must be .* 'lower', 'upper'"),
        ({"layer": ["lower", "lower"]}, "`layer` must be LSTMs with different names"),
    ],
    ids=str,
)
def test_invalid_monitor(series, arguments, message):
    lower = LAYERS["LSTM"](name="lower", return_sequences=True)
    model = stack(lower, LAYERS["LSTM"](name="upper"))
    before = model.get_weights()
    with pytest.raises(ValueError, match=message):
        fit(model, *series, callbacks=[GateMonitor(**{"probe": series[0]} | arguments)])
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


# --- both --------------------------------------------------------------------


@pytest.mark.parametrize(("is_first", "verbose"), [(True, 0), (False, 1)])
def test_later_callbacks_but_the_progress_bar_see_the_logs(
    series, tmp_path, capsys, is_first, verbose
):
    before, after = [], []
    every = [
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, seen=seen: seen.append(set(logs))
        )
        for seen in (before, after)
    ]
    ours = [
        GateMonitor(series[0], None, [name]) for name in ("saturation", "weight_norms")
    ]
    ours.append(PerplexityLogger(verbose=0))
    every[1:1] = ours if is_first else ours[::-1]
    every.append(keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    model = stack(LAYERS["ScratchLSTM"](name="lstm"))
    result = model.fit(*series, epochs=2, callbacks=every, verbose=verbose)
    history = result.history
    assert {*SATURATION, "lstm/W_xi_norm", "tokens_per_sec"} <= set(history)
    assert (before, after) == ([{"loss"}] * 2, [set(history)] * 2)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    for name, values in history.items():
        assert [float(row[name]) for row in rows] == pytest.approx(values)
    printed = capsys.readouterr().out
    assert ("tokens_per_sec: " in printed) == (verbose > 0)
    assert "lstm/" not in printed
    assert " tokens/sec on " not in printed
    assert vars(result).keys() == vars(keras.callbacks.History()).keys() | {"epoch"}
