"""Results of concurrent threads match those of one thread."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence, trace_gates
from keras_scratch_lstm.tracing.trace import ARRAYS

THREADS, REPEATS = 8, 4
BACKEND = keras.backend.backend()

LAYERS = {
    "ScratchLSTM": lambda: ScratchLSTM(4, return_sequences=True, name="lstm"),
    "reference loop": lambda: ScratchLSTM(4, activation="softsign", name="lstm"),
    "RNN(ScratchLSTMCell)": lambda: layers.RNN(ScratchLSTMCell(4), name="lstm"),
    "Bidirectional": lambda: layers.Bidirectional(ScratchLSTM(4), name="lstm"),
    "LSTM": lambda: layers.LSTM(4, name="lstm"),
}


def run_concurrently(function, inputs):
    """Return the results of `REPEATS` calls for each input, each in its own thread."""
    results, errors = [None] * len(inputs), []
    start = threading.Barrier(len(inputs))

    def run(index):
        try:
            start.wait(60)
            results[index] = [function(inputs[index]) for _ in range(REPEATS)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return results


@pytest.fixture(params=LAYERS)
def model(request):
    tokens = keras.Input((7,), dtype="int32")
    return keras.Sequential([tokens, layers.Embedding(9, 5), LAYERS[request.param]()])


@pytest.fixture
def inputs(rng):
    return [rng.integers(0, 9, (3, 7)) for _ in range(THREADS)]


def assert_same(results, expected):
    for several, one in zip(results, expected, strict=True):
        for other in several:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_concurrent_calls(model, inputs):
    def call(tokens):
        return ops.convert_to_numpy(model(tokens))

    assert_same(run_concurrently(call, inputs), [call(tokens) for tokens in inputs])


@pytest.mark.skipif(
    BACKEND == "jax", reason="Keras replaces a model's variables while it predicts"
)
def test_concurrent_predictions(model, inputs):
    def predict(tokens):
        return model.predict(tokens, verbose=0)

    expected = [predict(tokens) for tokens in inputs]
    assert_same(run_concurrently(predict, inputs), expected)


def test_concurrent_traces(model, inputs):
    def trace(tokens):
        found = trace_gates(model, tokens)
        both = [found] if found.backward is None else [found, found.backward]
        return np.stack([getattr(one, name) for one in both for name in ARRAYS])

    # The concurrent calls come first, when nothing is compiled.
    results = run_concurrently(trace, inputs)
    assert_same(results, [trace(tokens) for tokens in inputs])


def test_calls_during_traces(model, inputs):
    def either(job):
        traced, tokens = job
        if traced:
            return trace_gates(model, tokens).h
        return ops.convert_to_numpy(model(tokens))

    jobs = [(index % 2 == 0, tokens) for index, tokens in enumerate(inputs)]
    assert_same(run_concurrently(either, jobs), [either(job) for job in jobs])


def test_force_is_limited_to_its_thread():
    def implementations(name):
        if name is None:
            return sorted(recurrence.implementations())
        with recurrence.force(name):
            return sorted(recurrence.implementations())

    available = sorted(recurrence.implementations())
    results = run_concurrently(implementations, [None, "loop"] * (THREADS // 2))
    assert results == [[available] * REPEATS, [[]] * REPEATS] * (THREADS // 2)
