"""Results of concurrent threads match those of one thread."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_scratch_lstm import ScratchLSTM, recurrence, trace_gates
from keras_scratch_lstm.tracing.trace import ARRAYS

THREADS, REPEATS = 8, 3
pytestmark = pytest.mark.ci
BACKEND = keras.backend.backend()

LAYERS = {
    "ScratchLSTM": lambda: ScratchLSTM(4, return_sequences=True, name="lstm"),
    "reference loop": lambda: ScratchLSTM(4, activation="softsign", name="lstm"),
    "LSTM": lambda: layers.LSTM(4, name="lstm"),
}


def call(model, tokens):
    return ops.convert_to_numpy(model(tokens))


def predict_on_batch(model, tokens):
    return model.predict_on_batch(tokens)


def trace(model, tokens):
    found = trace_gates(model, tokens)
    return np.stack([getattr(found, name) for name in ARRAYS])


def run_concurrently(function, jobs):
    """Return the results of `REPEATS` calls for each job, each in its own thread."""
    results, errors = [None] * len(jobs), []
    start = threading.Barrier(len(jobs))

    def run(index):
        try:
            start.wait(60)
            results[index] = [function(jobs[index]) for _ in range(REPEATS)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    return results


@pytest.mark.parametrize("layer", LAYERS)
def test_concurrent_results_match_one_thread(layer, rng):
    inputs = keras.Input((7,), dtype="int32")
    model = keras.Sequential([inputs, layers.Embedding(9, 5), LAYERS[layer]()])
    # On JAX, Keras replaces variables while it predicts.
    functions = [trace, call] + [predict_on_batch] * (BACKEND != "jax")

    def run(job):
        function, tokens = job
        return function(model, tokens)

    jobs = [
        (functions[k % len(functions)], rng.integers(0, 9, (3, 7)))
        for k in range(THREADS)
    ]
    run(jobs[len(functions) - 1])  # Keras compiles its function in one thread only
    results = run_concurrently(run, jobs)
    for several, job in zip(results, jobs, strict=True):
        expected = run(job)
        for one in several:
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


def test_force_is_limited_to_its_thread():
    def implementations(name):
        with recurrence.force(name):
            return sorted(recurrence.implementations())

    available = sorted(recurrence.implementations())
    results = run_concurrently(implementations, [None, "loop"] * (THREADS // 2))
    assert results == [[available] * REPEATS, [[]] * REPEATS] * (THREADS // 2)
