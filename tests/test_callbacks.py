import csv
import itertools
import re

import keras
import numpy as np
import pytest

from keras_scratch_lstm import Perplexity, PerplexityLogger, callbacks

TIME, VOCABULARY = 5, 11


def build(metrics=(), time=TIME, regularizer=None):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((time, 3)),
            keras.layers.Dense(VOCABULARY, kernel_regularizer=regularizer),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=list(metrics))
    return model


@pytest.fixture
def data(rng):
    x = rng.normal(size=(37, TIME, 3)).astype("float32")
    return x, rng.integers(0, VOCABULARY, (37, TIME))


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second each time that one looks at it."""
    ticks = itertools.count()
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: float(next(ticks)))


def test_the_numbers_are_the_metrics(data, tmp_path):
    log = tmp_path / "log.csv"
    model = build([Perplexity(name="exact")])
    history = model.fit(
        *data,
        validation_data=data,
        batch_size=8,
        epochs=3,
        verbose=0,
        callbacks=[PerplexityLogger(), keras.callbacks.CSVLogger(log)],
    ).history
    for prefix in ("", "val_"):
        logged, exact = history[f"{prefix}perplexity"], history[f"{prefix}exact"]
        np.testing.assert_allclose(logged, exact, rtol=1e-5)
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in rows] == history["perplexity"]
    assert all(float(row["tokens_per_sec"]) > 0 for row in rows)


def test_a_perplexity_that_is_there_already_stays(data):
    # An accuracy of that name: at most 1, so never taken for the exponential
    # of a loss.
    model = build([keras.metrics.SparseCategoricalAccuracy(name="perplexity")])
    history = model.fit(
        *data, validation_data=data, verbose=0, callbacks=[PerplexityLogger()]
    ).history
    assert history["perplexity"][0] <= 1 < np.exp(history["loss"][0])
    own = model.evaluate(*data, verbose=0, return_dict=True)
    assert history["val_perplexity"][0] == pytest.approx(own["perplexity"])


@pytest.mark.parametrize("validated", [False, True])
def test_tokens_and_seconds_are_counted(data, clock, validated):
    logger = PerplexityLogger(verbose=0)
    history = (
        build()
        .fit(
            *data,
            batch_size=8,
            epochs=2,
            validation_data=data if validated else None,
            verbose=0,
            callbacks=[logger],
        )
        .history
    )
    # From an epoch's start to its training's end is one look at the clock.
    tokens = 37 * TIME
    assert history["tokens_per_sec"] == [tokens, tokens]
    # Two epochs of a start, the end of training and the end.
    assert logger.seconds == 5
    assert logger.tokens_per_sec == 2 * tokens / 5


def test_the_closing_line(data, capsys):
    model = build()
    logger = PerplexityLogger()
    history = model.fit(*data, verbose=0, epochs=2, callbacks=[logger]).history
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert printed == logger.closing_line
    line = r"perplexity (\d+\.\d), (\d+\.\d) tokens/sec on /(CPU|GPU|TPU):\d+"
    perplexity, speed, _ = re.fullmatch(line, printed).groups()
    assert perplexity == f"{history['perplexity'][-1]:.1f}"
    assert speed == f"{logger.tokens_per_sec:.1f}"


def test_silent_if_asked(data, capsys):
    logger = PerplexityLogger(verbose=0)
    build().fit(*data, verbose=0, callbacks=[logger])
    assert "perplexity" not in capsys.readouterr().out
    assert logger.closing_line.startswith("perplexity ")


def test_an_open_time_leaves_the_speed_out(data):
    logger = PerplexityLogger(verbose=0)
    history = build(time=None).fit(*data, verbose=0, callbacks=[logger]).history
    assert sorted(history) == ["loss", "perplexity"]
    assert logger.tokens_per_sec is None
    assert "tokens/sec" not in logger.closing_line


def test_penalties_in_the_loss_are_told(data):
    with pytest.warns(UserWarning, match="compile the model with `metrics=\\[Perp"):
        build(regularizer="l2").fit(
            *data, verbose=0, callbacks=[PerplexityLogger(verbose=0)]
        )
    # With the metric there is nothing to warn of, and warnings are errors.
    build([Perplexity()], regularizer="l2").fit(
        *data, verbose=0, callbacks=[PerplexityLogger(verbose=0)]
    )


def test_a_huge_loss_is_an_infinite_perplexity():
    logger = PerplexityLogger(verbose=0)
    logger.set_model(build())
    logger.on_epoch_begin(0)
    logs = {"loss": 1000.0}
    logger.on_epoch_end(0, logs)
    assert logs["perplexity"] == np.inf


def test_evaluate_alone_needs_no_training(data):
    build().evaluate(*data, verbose=0, callbacks=[PerplexityLogger()])
