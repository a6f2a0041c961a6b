"""The book's own code with `ScratchLSTM` for its layer."""

import math
import random

import keras
import numpy as np
import pytest

from keras_scratch_lstm import ScratchLSTM

if keras.backend.backend() != "tensorflow":
    pytest.skip("d2l's loop needs the tensorflow backend", allow_module_level=True)

d2l = pytest.importorskip("d2l.tensorflow", reason="the extra `d2l` is not installed")
import d2l_lstm
import tensorflow as tf

UNITS = 16


@pytest.fixture
def batches(book, monkeypatch, seed):
    """d2l's minibatches of the book's text, and its vocabulary."""
    monkeypatch.setattr(d2l, "download", lambda name: str(book))
    random.seed(seed)
    return d2l.load_data_time_machine(8, 10, max_tokens=1000)


def model_of(vocab):
    keras.utils.set_random_seed(3)
    layer = ScratchLSTM(
        UNITS, time_major=True, return_sequences=True, return_state=True
    )
    return d2l.RNNModel(layer, len(vocab))


def test_the_books_loop_trains_it(batches):
    iterator, vocab = batches
    net = model_of(vocab)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    updater = keras.optimizers.SGD(1.0)
    perplexities = [
        d2l.train_epoch_ch8(net, iterator, loss, updater, use_random_iter)[0]
        for use_random_iter in (False, True, False, False, False)
    ]
    assert net.rnn.recurrence == "tensorflow"
    # Guessing among 28 tokens is 28.
    assert perplexities[-1] < perplexities[0] < 30
    assert perplexities[-1] < 22
    text = d2l.predict_ch8("time traveller", 20, net, vocab)
    assert text.startswith("time traveller")
    assert len(text.replace("<unk>", "?")) == 34


@pytest.mark.filterwarnings("ignore:`set_matplotlib_formats`:DeprecationWarning")
def test_the_books_training_and_closing_lines(batches, capsys):
    iterator, vocab = batches
    d2l.train_ch8(
        model_of(vocab), iterator, vocab, 1.0, 3, tf.distribute.get_strategy()
    )
    closing, *samples = capsys.readouterr().out.splitlines()
    perplexity, speed = closing.removeprefix("perplexity ").split(", ")
    assert 1 < float(perplexity) < 28
    assert float(speed.split(" ")[0]) > 0
    lengths = [len(sample.replace("<unk>", "?")) for sample in samples]
    assert lengths == [64, 59]


def test_the_books_parameters_give_the_books_outputs(batches, rng):
    iterator, vocab = batches
    parameters = d2l_lstm.lstm_parameters(len(vocab), UNITS)
    for parameter in parameters:
        parameter.assign(rng.normal(0, 0.7, parameter.shape).astype("float32"))
    scratch = d2l.RNNModelScratch(
        len(vocab), UNITS, d2l_lstm.zero_state, d2l_lstm.lstm, lambda *_: parameters
    )
    net = model_of(vocab)
    states = [model.begin_state(8, dtype=tf.float32) for model in (scratch, net)]
    net(tf.zeros((8, 10), "int32"), states[1])  # builds it
    net.rnn.set_weights([parameter.numpy() for parameter in parameters[:12]])
    net.dense.set_weights([parameter.numpy() for parameter in parameters[12:]])
    minibatches = 0
    for x, _ in iterator:
        theirs, states[0] = scratch(x, states[0])
        ours, states[1] = net(x, states[1])
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-5)
        for one, other in zip(*states, strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)
        minibatches += 1
    assert minibatches == math.floor((1000 - 10 - 1) / 8) // 10
    theirs = d2l.predict_ch8("time traveller", 20, scratch, vocab)
    assert d2l.predict_ch8("time traveller", 20, net, vocab) == theirs
