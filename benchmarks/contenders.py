"""The models that the benchmarks compare, and their data."""

import importlib.util
import sys
import time
from pathlib import Path

VOCABULARY = 28


def layers():
    """Keras layers: name to a function of units and keyword arguments."""
    import keras

    from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

    def in_rnn(cell):
        return lambda units, **kwargs: keras.layers.RNN(cell(units), **kwargs)

    return {
        "RNN(LSTMCell)": in_rnn(keras.layers.LSTMCell),
        "LSTM": keras.layers.LSTM,
        "RNN(ScratchLSTMCell)": in_rnn(ScratchLSTMCell),
        "ScratchLSTM": ScratchLSTM,
    }


def variants():
    """`ScratchLSTM` with each cell of `keras_scratch_lstm.cells`."""
    import keras_scratch_lstm
    from keras_scratch_lstm import ScratchLSTM

    def layer_of(make_cell):
        return lambda units, **kwargs: ScratchLSTM(cell=make_cell(units), **kwargs)

    names = "Peephole", "Coupled", "LayerNorm", "Zoneout", "DropConnect"
    names = [f"{name}LSTMCell" for name in names]
    cells = {name: layer_of(getattr(keras_scratch_lstm, name)) for name in names}
    return {"ScratchLSTM": ScratchLSTM, **cells}


def random_text(shape, padded=False):
    """One-hot random tokens, and their next tokens as targets.

    With `padded`, the sequences have random lengths, and zeros as padding.
    """
    import numpy as np

    batches, batch, steps = shape
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCABULARY, size=(batches * batch, steps + 1))
    x = np.eye(VOCABULARY, dtype="float32")[tokens[:, :-1]]
    if padded:
        lengths = rng.integers(1, steps + 1, size=(batches * batch, 1))
        x[np.arange(steps) >= lengths] = 0
    return x, tokens[:, 1:].astype("int32")


def build_model(make_layer, units, shape, padded=False):
    import keras

    model = keras.Sequential(
        [
            keras.Input((shape[2], VOCABULARY)),
            *([keras.layers.Masking()] if padded else []),
            make_layer(units, return_sequences=True),
            keras.layers.Dense(VOCABULARY),
        ]
    )
    model.compile(
        keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def keras_contender(make_layer, padded=False):
    def make(units, shape):
        model = build_model(make_layer, units, shape, padded)
        return fit(model, *random_text(shape, padded), shape)

    return make


def fit(model, x, y, shape):
    """A function that trains for an epoch, and returns its seconds."""
    import keras

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds = time.perf_counter() - self.start

    def train(batches=shape[0]):
        rows, clock = batches * shape[1], Clock()
        model.fit(x[:rows], y[:rows], batch_size=shape[1], verbose=0, callbacks=[clock])
        return clock.seconds

    return train


def forecasters(features, units, shape):
    """Small models of numbers, each with a layer and with a bidirectional one."""
    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.normal(size=(shape[0] * shape[1], shape[2], features)).astype("float32")
    y = x[:, -1, :1]
    found = {}
    for name in ("LSTM", "ScratchLSTM"):
        layer = layers()[name]
        both = keras.layers.Bidirectional(layer(units))
        for title, lstm in ((name, layer(units)), (f"Bidirectional({name})", both)):
            inputs = keras.Input(x.shape[1:])
            model = keras.Sequential([inputs, lstm, keras.layers.Dense(1)])
            model.compile("adam", "mse")
            found[title] = fit(model, x, y, shape)
    return found


def native_torch(units, shape):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lstm = torch.nn.LSTM(VOCABULARY, units, batch_first=True, device=device)
    logits = torch.nn.Linear(units, VOCABULARY, device=device)
    parameters = [*lstm.parameters(), *logits.parameters()]
    optimizer = torch.optim.SGD(parameters, 1.0)
    loss = torch.nn.CrossEntropyLoss()
    x, y = (torch.tensor(values) for values in random_text(shape))
    x, y = x.split(shape[1]), y.long().split(shape[1])

    def train(batches=shape[0]):
        for X, Y in zip(x[:batches], y[:batches], strict=True):
            X, Y = X.to(device), Y.to(device)
            optimizer.zero_grad()
            scores = logits(lstm(X)[0])
            loss(scores.flatten(0, 1), Y.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def torch_in_fit(units, shape):
    """`torch.nn.LSTM` in `model.fit`, which shows the overhead of `fit`."""
    import keras
    import torch

    class LSTM(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(VOCABULARY, units, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    def make_layer(units, return_sequences):
        shape_out = (None, shape[2], units)
        return keras.layers.TorchModuleWrapper(LSTM(), output_shape=shape_out)

    return keras_contender(make_layer)(units, shape)


def d2l_loop(units, shape):
    """The from-scratch training loop of d2l, as in the example."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import keras
    import tensorflow as tf
    from d2l import tensorflow as d2l
    from helpers import d2l_lstm

    net = d2l.RNNModelScratch(
        VOCABULARY,
        units,
        d2l_lstm.zero_state,
        d2l_lstm.lstm,
        d2l_lstm.lstm_parameters,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    updater = keras.optimizers.SGD(1.0)
    x, y = random_text(shape)
    x = tf.constant(x.argmax(-1).reshape(*shape))
    y = tf.constant(y.reshape(*shape))

    def train(batches=shape[0]):
        minibatches = list(zip(x[:batches], y[:batches], strict=True))
        d2l.train_epoch_ch8(net, minibatches, loss, updater, use_random_iter=True)

    return train


def contenders(backend):
    found = {name: keras_contender(make) for name, make in layers().items()}
    if importlib.util.find_spec("torch"):
        found["torch.nn.LSTM"] = native_torch
    if backend == "torch":
        found["torch.nn.LSTM in fit"] = torch_in_fit
    if backend == "tensorflow" and importlib.util.find_spec("d2l"):
        found["d2l"] = d2l_loop
    return found
