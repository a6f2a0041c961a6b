"""The book's LSTM from scratch, trained by the book's own loop (`d2l==0.17.0`)."""

from types import SimpleNamespace

import keras
import tensorflow as tf
from d2l import tensorflow as d2l
from helpers.book_text import PREFIXES
from tqdm import tqdm

if keras.backend.backend() != "tensorflow":
    raise ImportError("KERAS_BACKEND is not tensorflow")


def lstm_parameters(vocabulary_size, units):
    """Returns the parameters: twelve of the LSTM, two of the output layer."""

    def normal(*shape):
        return tf.Variable(tf.random.normal(shape, stddev=0.01))

    def zeros(size):
        return tf.Variable(tf.zeros(size))

    parameters = []
    for _ in "ifoc":
        parameters += [normal(vocabulary_size, units), normal(units, units)]
        parameters += [zeros(units)]
    return [*parameters, normal(units, vocabulary_size), zeros(vocabulary_size)]


def lstm(inputs, state, parameters):
    """Computes the forward pass over inputs of shape `(time, batch, vocabulary)`."""
    W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c = parameters[:12]
    W_hq, b_q = parameters[12:]
    h, c = state
    outputs = []
    for x in inputs:
        i = tf.sigmoid(x @ W_xi + h @ W_hi + b_i)
        f = tf.sigmoid(x @ W_xf + h @ W_hf + b_f)
        o = tf.sigmoid(x @ W_xo + h @ W_ho + b_o)
        c_tilde = tf.tanh(x @ W_xc + h @ W_hc + b_c)
        c = f * c + i * c_tilde
        h = o * tf.tanh(c)
        outputs.append(h @ W_hq + b_q)
    return tf.concat(outputs, axis=0), (h, c)


def zero_state(batch_size, units):
    return tf.zeros((batch_size, units)), tf.zeros((batch_size, units))


def train(name, args, vocabulary, batches, interrupt):
    """Trains the book's model, like `time_machine.train`, but without checkpoints."""
    keras.utils.set_random_seed(args.seed)
    with keras.device(args.device):
        net = d2l.RNNModelScratch(
            len(vocabulary), args.units, zero_state, lstm, lstm_parameters
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    updater = keras.optimizers.SGD(args.learning_rate)
    random_order = args.sampling == "random"
    batches.first_epoch, steps = 0, batches.steps_per_epoch
    history = {"perplexity": [], "tokens_per_sec": []}
    for epoch in tqdm(range(args.epochs), desc=name, unit="epoch"):
        pairs = [batches[epoch * steps + k] for k in range(steps)]
        pairs = [(tf.constant(x), tf.constant(y)) for x, y in pairs]
        results = d2l.train_epoch_ch8(net, pairs, loss, updater, random_order)
        for values, value in zip(history.values(), results, strict=True):
            values.append(float(value))
        if interrupt.requested:
            break
    device = net.trainable_variables[0].device
    result = SimpleNamespace(
        epochs=epoch + 1, history=history, failure=None, device=device
    )
    # Each token once, by frequency, gives the same indices.
    vocab = d2l.Vocab([vocabulary.tokens[1:]])
    return result, {p: d2l.predict_ch8(p, 50, net, vocab) for p in PREFIXES}
