"""Train two well-known variants of the LSTM, which override `gates`.

    python examples/custom_gates.py

- Peephole cell: the gates also see the cell state (Gers, Schraudolph and Schmidhuber,
  2002, "Learning Precise Timing with LSTM Recurrent Networks").
- Coupled cell: the forget gate is f = 1 - i (Greff et al., 2017, "LSTM: A Search Space
  Odyssey", where it was as accurate, with one gate less).

The task is timing: how many time steps are between two spikes?
"""

import math
import sys

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("custom_gates.py", __doc__)
    add, positive_integer = parser.add_argument, common.positive_integer
    add("--steps", type=positive_integer, default=40, help="length of a sequence")
    add("--units", type=positive_integer, default=8, help="units of each cell")
    add("--epochs", type=positive_integer, default=30, help="passes over 4,096 samples")
    add("--seed", type=common.seed, default=0, help="for weights and data")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import keras
import numpy as np

from keras_scratch_lstm import (
    CoupledLSTMCell,
    PeepholeLSTMCell,
    ScratchLSTM,
    ScratchLSTMCell,
)

CELLS = {
    "plain": ScratchLSTMCell,
    "peephole": PeepholeLSTMCell,
    "coupled": CoupledLSTMCell,
}


def spikes(count, steps, rng):
    """Returns sequences of two spikes, `(count, steps, 1)`, and their distances."""
    first = rng.integers(0, max(1, steps // 4), count)
    second = rng.integers(steps // 2, steps, count)
    x = np.zeros((count, steps, 1), "float32")
    x[np.arange(count), first] = x[np.arange(count), second] = 1
    return x, second - first


def train(cell, steps=40, epochs=30, seed=0):
    """Trains a cell; returns the model, and its accuracy on 2,048 new sequences."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = keras.Sequential(
        [keras.Input((steps, 1)), ScratchLSTM(cell=cell), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), "mse")
    x, distance = spikes(4096, steps, rng)
    model.fit(x, distance / steps, batch_size=64, epochs=epochs, verbose=0)
    x, distance = spikes(2048, steps, rng)
    predicted = model.predict(x, batch_size=256, verbose=0)[:, 0] * steps
    return model, float(np.mean(np.rint(predicted) == distance))


def main(argv=None):
    args = parse_arguments(argv)
    for name, make_cell in CELLS.items():
        cell = make_cell(args.units)
        _, accuracy = train(cell, args.steps, args.epochs, args.seed)
        weights = sum(math.prod(weight.shape) for weight in cell.trainable_weights)
        print(f"{name:>9}: {weights} weights, accuracy {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
