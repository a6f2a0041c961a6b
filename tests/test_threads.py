"""What several threads get from one model at once is what one would get."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence, trace_gates
from keras_scratch_lstm.tracing.trace import ARRAYS

THREADS, TIMES = 8, 4
BACKEND = keras.backend.backend()

LAYERS = {
    "layer": lambda: ScratchLSTM(4, return_sequences=True, name="lstm"),
    "loop": lambda: ScratchLSTM(4, activation="softsign", name="lstm"),
    "cell": lambda: layers.RNN(ScratchLSTMCell(4), name="lstm"),
    "both directions": lambda: layers.Bidirectional(ScratchLSTM(4), name="lstm"),
    "built-in": lambda: layers.LSTM(4, name="lstm"),
}


def at_once(work, inputs):
    """The results of a function for each input, each in a thread, `TIMES` over."""
    results, errors = [None] * len(inputs), []
    start = threading.Barrier(len(inputs))

    def run(index):
        try:
            start.wait(60)
            results[index] = [work(inputs[index]) for _ in range(TIMES)]
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


def test_calls(model, inputs):
    def call(tokens):
        return ops.convert_to_numpy(model(tokens))

    assert_same(at_once(call, inputs), [call(tokens) for tokens in inputs])


@pytest.mark.skipif(
    BACKEND == "jax", reason="Keras takes a model's variables away while it predicts"
)
def test_predictions(model, inputs):
    def predict(tokens):
        return model.predict(tokens, verbose=0)

    expected = [predict(tokens) for tokens in inputs]
    assert_same(at_once(predict, inputs), expected)


def test_traces(model, inputs):
    def trace(tokens):
        found = trace_gates(model, tokens)
        both = [found] if found.backward is None else [found, found.backward]
        return np.stack([getattr(one, name) for one in both for name in ARRAYS])

    # At first all at once, when nothing is compiled yet.
    results = at_once(trace, inputs)
    assert_same(results, [trace(tokens) for tokens in inputs])


def test_traces_among_calls(model, inputs):
    """The layer stops those calls alone that are to be traced."""

    def either(job):
        traced, tokens = job
        if traced:
            return trace_gates(model, tokens).h
        return ops.convert_to_numpy(model(tokens))

    jobs = [(index % 2 == 0, tokens) for index, tokens in enumerate(inputs)]
    assert_same(at_once(either, jobs), [either(job) for job in jobs])


def test_only_holds_in_its_own_thread():
    def ways(way):
        if way is None:
            return sorted(recurrence.implementations())
        with recurrence.force(way):
            return sorted(recurrence.implementations())

    everything = sorted(recurrence.implementations())
    results = at_once(ways, [None, "loop"] * (THREADS // 2))
    assert results == [[everything] * TIMES, [[]] * TIMES] * (THREADS // 2)
