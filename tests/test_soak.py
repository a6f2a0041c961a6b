"""Memory of one process over thousands of calls. Run with `pytest -m slow -s`."""

import gc
import os
from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from keras_scratch_lstm import (
    GateMonitor,
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    trace_gates,
)

pytestmark = pytest.mark.slow
CALLS, WARM_UP, MB = 2000, 300, 2**20
SLACK = 10 * MB  # what a process may grow by without a leak: 5 kB per call


def resident():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(work):
    """Return by how many bytes `CALLS` calls grow the process, after a warm-up."""
    for _ in range(WARM_UP):
        work()
    before = resident()
    for _ in range(CALLS):
        work()
    return resident() - before


X = np.ones((4, 5), "int32")


def make_model(layer):
    lstm = layer(8, return_sequences=True)
    tokens = keras.Input((None,), dtype="int32")
    model = keras.Sequential([tokens, layers.Embedding(7, 3), lstm, layers.Dense(7)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=[Perplexity()])
    return model


def fit(layer, *callbacks):
    fit = make_model(layer).fit
    return lambda: fit(X, X, callbacks=list(callbacks), verbose=0)


@pytest.mark.parametrize(
    ("work", "reference"),
    [  # Keras itself grows
        (lambda: fit(ScratchLSTM, PerplexityLogger(0)), lambda: fit(layers.LSTM)),
        (lambda: fit(ScratchLSTM, GateMonitor(X)), lambda: fit(ScratchLSTM)),
        (lambda: partial(trace_gates, make_model(ScratchLSTM), X), None),
        (lambda: partial(trace_gates, make_model(layers.LSTM), X), None),
    ],
    ids=["fit", "monitor", "trace", "trace of built-in"],
)
def test_memory_does_not_grow(work, reference):
    expected = growth(reference()) if reference else 0
    grown = growth(work())
    print(f"{CALLS} calls: {grown / MB:+.1f} MB, reference {expected / MB:+.1f} MB")
    assert grown < max(expected, 0) + SLACK
