"""Comparison with the book's package, `d2l`."""

import random

import keras
import numpy as np
import pytest
from helpers.book_text import (
    Vocabulary,
    load_text,
    random_starts,
    sequential_starts,
    tokenize,
)

from keras_scratch_lstm import ScratchLSTM

if keras.backend.backend() != "tensorflow":
    pytest.skip("d2l's loop needs the tensorflow backend", allow_module_level=True)

d2l = pytest.importorskip("d2l.tensorflow", reason="the extra `d2l` is not installed")
import tensorflow as tf
import time_machine
from helpers import d2l_lstm

UNITS = 16


@pytest.fixture(autouse=True)
def without_download(book, monkeypatch):
    monkeypatch.setattr(d2l, "download", lambda name: str(book))


@pytest.fixture
def text(book):
    """Our corpus and vocabulary."""
    tokens = tokenize(load_text(book).characters)
    vocabulary = Vocabulary(tokens)
    return vocabulary.encode(tokens), vocabulary


@pytest.fixture
def batches(seed):
    """d2l's minibatches and vocabulary."""
    random.seed(seed)
    return d2l.load_data_time_machine(8, 10, max_tokens=1000)


def scratch_model(vocabulary_size, rng):
    """d2l's model of the book's LSTM, with random parameters."""
    parameters = d2l_lstm.lstm_parameters(vocabulary_size, UNITS)
    for parameter in parameters:
        parameter.assign(rng.normal(0, 0.7, parameter.shape).astype("float32"))
    return d2l.RNNModelScratch(
        vocabulary_size,
        UNITS,
        d2l_lstm.zero_state,
        d2l_lstm.lstm,
        lambda *_: parameters,
    ), [parameter.numpy() for parameter in parameters]


def layer_model(vocabulary_size):
    """d2l's model of a layer, with a `ScratchLSTM`."""
    keras.utils.set_random_seed(3)
    layer = ScratchLSTM(
        UNITS, time_major=True, return_sequences=True, return_state=True
    )
    return d2l.RNNModel(layer, vocabulary_size)


def test_corpus_and_vocabulary_match(text):
    corpus, vocabulary = text
    d2l_corpus, d2l_vocabulary = d2l.load_corpus_time_machine()
    assert vocabulary.tokens == d2l_vocabulary.idx_to_token
    np.testing.assert_array_equal(corpus, d2l_corpus)


@pytest.mark.parametrize("length", [10_000, 20_011])
@pytest.mark.parametrize(
    ("make_starts", "d2l_name"),
    [
        (sequential_starts, "seq_data_iter_sequential"),
        (random_starts, "seq_data_iter_random"),
    ],
)
def test_minibatches_match(text, make_starts, d2l_name, length, seed):
    corpus = text[0][:length]
    for epoch in range(3):
        random.seed(seed + epoch)
        expected = list(getattr(d2l, d2l_name)(list(corpus), 32, 35))
        random.seed(seed + epoch)
        windows = corpus[make_starts(length, 32, 35, random)[..., None] + np.arange(36)]
        for window, (x, y) in zip(windows, expected, strict=True):
            np.testing.assert_array_equal(window[:, :-1], x.numpy())
            np.testing.assert_array_equal(window[:, 1:], y.numpy())


@pytest.mark.parametrize("name", ["ScratchLSTMCell", "ScratchLSTM"])
def test_stateful_outputs_and_generated_text_match(text, rng, name):
    corpus, vocabulary = text
    scratch, parameters = scratch_model(len(vocabulary), rng)
    layer = time_machine.LAYERS[name]
    rnn = layer(UNITS, return_sequences=True, stateful=True, name="rnn")
    model = time_machine.build_model(rnn, len(vocabulary), 4, 7)
    rnn.cell.set_weights(parameters[:12])
    model.get_layer("logits").set_weights(parameters[12:])

    state = scratch.begin_state(4)
    for k in range(3):
        x = corpus[28 * k : 28 * (k + 1)].reshape(4, 7)
        outputs, state = scratch(tf.constant(x), state)
        logits = model(x).numpy().swapaxes(0, 1).reshape(-1, len(vocabulary))
        np.testing.assert_allclose(logits, outputs.numpy(), atol=2e-5)
        for actual, expected in zip(rnn.states, state, strict=True):
            np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=1e-5)

    vocab = d2l.Vocab([vocabulary.tokens[1:]])
    for start in ("time traveller", "the", "q"):
        expected = d2l.predict_ch8(start, 50, scratch, vocab)
        assert len(expected.replace("<unk>", "?")) == len(start) + 50  # one token
        assert time_machine.generate(model, vocabulary, start) == expected


def test_time_major_outputs_match_within_the_books_model(batches, rng):
    iterator, vocab = batches
    scratch, parameters = scratch_model(len(vocab), rng)
    model = layer_model(len(vocab))
    states = [net.begin_state(8, dtype=tf.float32) for net in (scratch, model)]
    model(tf.zeros((8, 10), "int32"), states[1])  # builds it
    model.rnn.set_weights(parameters[:12])
    model.dense.set_weights(parameters[12:])
    xs = [x for x, _ in iterator]
    assert len(xs) == (1000 - 10 - 1) // 8 // 10
    for x in xs:
        expected, states[0] = scratch(x, states[0])
        actual, states[1] = model(x, states[1])
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), atol=2e-5)
        for one, other in zip(*states, strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), 1e-5, atol=1e-5)
    expected = d2l.predict_ch8("time traveller", 20, scratch, vocab)
    assert d2l.predict_ch8("time traveller", 20, model, vocab) == expected
