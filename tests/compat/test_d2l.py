"""The book's own package as the measure."""

import random

import keras
import numpy as np
import pytest
from book_text import (
    Vocabulary,
    load_text,
    random_batches,
    sequential_batches,
    tokenize,
)

if keras.backend.backend() != "tensorflow":
    pytest.skip("d2l's loop needs the tensorflow backend", allow_module_level=True)

d2l = pytest.importorskip("d2l.tensorflow", reason="the extra `d2l` is not installed")
import d2l_lstm
import tensorflow as tf
import time_machine


@pytest.fixture
def texts(book, monkeypatch):
    """Corpus and vocabulary, d2l's and ours, of the same file."""
    monkeypatch.setattr(d2l, "download", lambda name: str(book))
    tokens = tokenize(load_text(book).characters)
    vocabulary = Vocabulary(tokens)
    return d2l.load_corpus_time_machine(), (vocabulary.encode(tokens), vocabulary)


def test_corpus_and_vocabulary(texts):
    (d2l_corpus, d2l_vocab), (corpus, vocabulary) = texts
    assert vocabulary.tokens == d2l_vocab.idx_to_token
    np.testing.assert_array_equal(corpus, d2l_corpus)


@pytest.mark.parametrize("length", [10_000, 20_011, 170_580])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sequential_batches, "seq_data_iter_sequential"),
        (random_batches, "seq_data_iter_random"),
    ],
)
def test_minibatches_for_the_same_random_state(texts, ours, theirs, length, seed):
    _, (corpus, _) = texts
    corpus = corpus[:length]
    for epoch in range(3):
        random.seed(seed + epoch)
        expected = list(getattr(d2l, theirs)(list(corpus), 32, 35))
        random.seed(seed + epoch)
        x, y = ours(corpus, 32, 35, random)
        assert len(x) == len(expected) > 0
        for k, (d2l_x, d2l_y) in enumerate(expected):
            np.testing.assert_array_equal(x[k], d2l_x.numpy())
            np.testing.assert_array_equal(y[k], d2l_y.numpy())


@pytest.mark.parametrize("name", ["scratch", "layer"])
def test_the_books_parameters_are_the_cells_weights(texts, rng, name):
    """Outputs, states and generated text are the book's own."""
    _, (corpus, vocabulary) = texts
    keras.utils.set_random_seed(3)
    parameters = d2l_lstm.lstm_parameters(len(vocabulary), 16)
    for parameter in parameters:
        parameter.assign(rng.normal(0, 0.7, parameter.shape).astype("float32"))
    layer = time_machine.LAYERS[name]
    rnn = layer(16, return_sequences=True, stateful=True, name="rnn")
    model = time_machine.build_model(rnn, len(vocabulary), 4, 7)
    rnn.cell.set_weights(parameters[:12])
    model.get_layer("logits").set_weights(parameters[12:])

    net = d2l.RNNModelScratch(
        len(vocabulary), 16, d2l_lstm.zero_state, d2l_lstm.lstm, lambda *_: parameters
    )
    state = net.begin_state(4)
    for k in range(3):
        x = corpus[28 * k : 28 * (k + 1)].reshape(4, 7)
        outputs, state = net(tf.constant(x), state)
        logits = model(x).numpy().swapaxes(0, 1).reshape(-1, len(vocabulary))
        np.testing.assert_allclose(logits, outputs.numpy(), atol=2e-5)
        for ours, theirs in zip(rnn.states, state, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5)

    vocab = d2l.Vocab([vocabulary.tokens[1:]])
    for start in ("time traveller", "the", "q"):
        theirs = d2l.predict_ch8(start, 50, net, vocab)
        # `<unk>`, which chance may choose, is one token.
        assert len(theirs.replace("<unk>", "?")) == len(start) + 50
        assert time_machine.generate(model, vocabulary, start) == theirs
