"""Cells of one's own: two famous variants of the LSTM, each an override of `gates`.

    python examples/custom_gates.py

- In a peephole cell, the gates see the memory: Gers, Schraudolph and Schmidhuber,
  2002, "Learning Precise Timing with LSTM Recurrent Networks".
- In a coupled cell, what is forgotten is what is taken in, f = 1 - i: Greff et al.,
  2017, "LSTM: A Search Space Odyssey", where it did as well with a gate less.

Both train beside the plain cell on a task of timing: two spikes, and the answer is
how many steps lie between them.
"""

import argparse
import math
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import Gates, ScratchLSTM, ScratchLSTMCell


@keras.saving.register_keras_serializable("custom_gates")
class PeepholeCell(ScratchLSTMCell):
    """Gates that see the memory: i and f the last one, o the new one."""

    def build(self, input_shape):
        super().build(input_shape)
        for name in ("p_i", "p_f", "p_o"):  # a number a unit, as in the paper
            weight = self.add_weight(
                name=name, shape=(self.units,), initializer="zeros"
            )
            setattr(self, name, weight)

    def gates(self, x, h, c):
        i = ops.sigmoid(x @ self.W_xi + h @ self.W_hi + c * self.p_i + self.b_i)
        f = ops.sigmoid(x @ self.W_xf + h @ self.W_hf + c * self.p_f + self.b_f)
        c_tilde = ops.tanh(x @ self.W_xc + h @ self.W_hc + self.b_c)
        c_new = f * c + i * c_tilde
        o = ops.sigmoid(x @ self.W_xo + h @ self.W_ho + c_new * self.p_o + self.b_o)
        return Gates(i, f, o, c_tilde)


@keras.saving.register_keras_serializable("custom_gates")
class CoupledCell(ScratchLSTMCell):
    """Forgets just as much as it takes in."""

    def build(self, input_shape):
        super().build(input_shape)
        for weight in (self.W_xf, self.W_hf, self.b_f):
            weight.trainable = False  # not in use

    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


CELLS = {"plain": ScratchLSTMCell, "peephole": PeepholeCell, "coupled": CoupledCell}


def spikes(count, steps, rng):
    """`count` sequences of two spikes, `(count, steps, 1)`, and their distances."""
    first = rng.integers(0, steps // 4, count)
    second = rng.integers(steps // 2, steps, count)
    x = np.zeros((count, steps, 1), "float32")
    x[np.arange(count), first] = x[np.arange(count), second] = 1
    return x, second - first


def train(cell, steps=40, epochs=30, seed=0):
    """Trains one cell on the task.

    Args:
        cell: A `ScratchLSTMCell`, or one of a subclass.
        steps: Integer, how long a sequence is.
        epochs: Integer, how often the 4,096 sequences are gone through.
        seed: Integer, of the sequences, the weights and the batches.

    Returns:
        The model, and the share of 2,048 unseen sequences whose distance it gets
        right to the step.
    """
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model = keras.Sequential(
        [keras.Input((steps, 1)), ScratchLSTM(cell=cell), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01, global_clipnorm=1.0), "mse")
    x, distance = spikes(4096, steps, rng)
    model.fit(x, distance / steps, batch_size=64, epochs=epochs, verbose=0)
    x, distance = spikes(2048, steps, rng)
    answer = model.predict(x, batch_size=256, verbose=0)[:, 0] * steps
    return model, float(np.mean(np.rint(answer) == distance))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of a sequence")
    parser.add_argument("--units", type=int, default=8, help="of each cell")
    parser.add_argument("--epochs", type=int, default=30, help="of 4,096 sequences")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    print("How many steps lie between two spikes?")
    for name, make_cell in CELLS.items():
        cell = make_cell(options.units)
        _, right = train(cell, options.steps, options.epochs, options.seed)
        trained = sum(math.prod(weight.shape) for weight in cell.trainable_weights)
        print(
            f"{name:>9}: {trained} weights, {right:.1%} right to the step", flush=True
        )
    print(
        "A cell is its gates: `ScratchLSTM` runs and trains whatever `gates` returns.\n"
        "The peepholes cost three weights a unit; the coupled gates save a quarter."
    )


if __name__ == "__main__":
    sys.exit(main())
