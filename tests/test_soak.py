"""Memory of one process over thousands of calls. Run with `pytest -m slow -s`."""

import gc
import os
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
CALLS, WARM_UP = 2000, 300
MB = 2**20
# What a process may grow by without a leak: 5 kB per call.
SLACK = 10 * MB


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


def report(what, grown):
    print(f"\n{what} on {keras.backend.backend()}: ", end="")
    print(", ".join(f"{name} {bytes / MB:+.1f} MB" for name, bytes in grown.items()))


def test_memory_of_fit():
    grown = {}
    for layer in (layers.LSTM, ScratchLSTM):
        model = make_model(layer)

        def fit(model=model):
            callbacks = [PerplexityLogger(verbose=0)]
            model.fit(X, X, callbacks=callbacks, verbose=0)

        grown[layer.__name__] = growth(fit)
    report(f"{CALLS} fits", grown)
    # Keras itself grows.
    assert grown["ScratchLSTM"] < max(grown["LSTM"], 0) + SLACK


def test_memory_of_trace_gates():
    grown = {}
    for layer in (layers.LSTM, ScratchLSTM):
        model = make_model(layer)
        grown[layer.__name__] = growth(lambda model=model: trace_gates(model, X))
    report(f"{CALLS} traces", grown)
    assert max(grown.values()) < SLACK


def test_memory_of_gate_monitor():
    model = make_model(ScratchLSTM)
    plain = growth(lambda: model.fit(X, X, verbose=0))
    monitor = GateMonitor(X)
    monitored = growth(lambda: model.fit(X, X, callbacks=[monitor], verbose=0))
    report(f"{CALLS} fits", {"plain": plain, "monitored": monitored})
    assert monitored < max(plain, 0) + SLACK
