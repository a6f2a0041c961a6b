"""The book's LSTM from scratch, trained by the book's own loop (`d2l==0.17.0`)."""

import math

import keras
import tensorflow as tf
from checkpoint import Saved, find_failure, random_state, restore
from d2l import tensorflow as d2l
from tqdm import tqdm


def lstm_parameters(vocabulary_size, units):
    """The book's parameter list: twelve of the LSTM, two of the output layer."""

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
    """The forward pass over `inputs`, of shape (time, batch, vocabulary)."""
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


def train_d2l(
    name, args, batches, vocabulary, device, interrupt, files, saved, prefixes, length
):
    """Trains the book's model as `time_machine.train` does a cell."""
    keras.utils.set_random_seed(args.seed)
    with tf.distribute.OneDeviceStrategy(device).scope():
        net = d2l.RNNModelScratch(
            len(vocabulary), args.units, zero_state, lstm, lstm_parameters
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        updater = keras.optimizers.SGD(args.learning_rate)
        updater.build(net.trainable_variables)
    # The states start at zero in each epoch, and nothing else is random.
    variables = [*net.trainable_variables, *updater.variables]
    epochs, failure, seconds = 0, None, 0.0
    history = {"perplexity": [], "tokens_per_sec": []}
    if saved:
        epochs, seconds, history = saved.epochs, saved.seconds, saved.history
        restore(variables, saved)
    timer = d2l.Timer()
    for epoch in tqdm(
        range(epochs, args.epochs),
        initial=epochs,
        total=args.epochs,
        desc=name,
        unit="epoch",
    ):
        x, y = batches.epoch(epoch)
        try:
            perplexity, speed = d2l.train_epoch_ch8(
                net,
                [(tf.constant(X), tf.constant(Y)) for X, Y in zip(x, y, strict=True)],
                loss,
                updater,
                use_random_iter=args.sampling == "random",
            )
        except OverflowError:  # exp of the loss
            perplexity, speed = math.inf, math.nan
        arrays = [variable.numpy() for variable in variables]
        failure = find_failure(epochs, "perplexity", perplexity, arrays)
        if failure:
            if epochs:
                restore(variables, files.load())
            break
        epochs, seconds = epoch + 1, seconds + timer.stop()
        timer.start()
        history["perplexity"].append(float(perplexity))
        history["tokens_per_sec"].append(float(speed))
        files.save(Saved(epochs, arrays, random_state(), history, seconds))
        if interrupt.requested:
            break
    # Each token once, most frequent first, gives the same indices.
    vocab = d2l.Vocab([vocabulary.tokens[1:]])
    samples = {
        prefix: d2l.predict_ch8(prefix, length, net, vocab) for prefix in prefixes
    }
    return {
        "epochs": epochs,
        "failure": failure,
        "seconds": seconds,
        "samples": samples,
        "history": history,
    }
