"""Gradients against finite differences, and training gate by gate."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from gradients import BACKEND, double_precision, with_gradients
from keras import layers, ops
from reference import NAMES

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence

ROOT = Path(__file__).parents[1]
GAPS = np.array([[1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool)


def tanh():
    """`keras.activations.tanh` computes in float32 on JAX, whatever it is given."""
    if BACKEND != "jax":
        return "tanh"
    import jax

    return jax.numpy.tanh


class PeepholeCell(ScratchLSTMCell):
    """Its forget gate looks at the memory."""

    def build(self, input_shape):
        super().build(input_shape)
        self.p_f = self.add_weight(
            name="p_f", shape=(self.units,), initializer="random_normal"
        )

    def gates(self, x, h, c):
        z_f = x @ self.W_xf + h @ self.W_hf + c * self.p_f + self.b_f
        return super().gates(x, h, c)._replace(f=ops.sigmoid(z_f))


def assert_gradients(function, variables, tensors, rng):
    """Gradients against the slope of the loss in a random direction of each."""

    def loss_and_itself(*tensors):
        loss = function(*tensors)
        return loss, loss

    evaluate, step = with_gradients(loss_and_itself, variables), 1e-5
    _, gradients = evaluate(*tensors)
    assert len(gradients) == len(variables) + len(tensors)
    for k, gradient in enumerate(gradients):
        direction, losses = rng.normal(size=gradient.shape), []
        for sign in (1, -1):
            moved, change = list(tensors), sign * step * direction
            if k < len(variables):
                before = ops.convert_to_numpy(variables[k]).copy()
                variables[k].assign(before + change)
            else:
                moved[k - len(variables)] = moved[k - len(variables)] + change
            losses.append(float(evaluate(*moved)[0]))
            if k < len(variables):
                variables[k].assign(before)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert abs(gradient).max() > 1e-4  # there is something to compare
        np.testing.assert_allclose((gradient * direction).sum(), slope, atol=1e-8)


@pytest.mark.parametrize("cell", [ScratchLSTMCell, PeepholeCell])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_gradients_of_a_cell(rng, cell, use_bias):
    with double_precision():
        cell = cell(3, tanh(), use_bias=use_bias, dtype="float64")
        cell.build((None, 2))
        tensors = [rng.normal(size=(3, size)) for size in (2, 3, 3)]
        weights = [rng.normal(size=(3, 3)) for _ in "hc"]

        def loss(x, h, c):
            _, states = cell(x, [h, c])
            pairs = zip(states, weights, strict=True)
            return sum(ops.sum(state * weight) for state, weight in pairs)

        assert_gradients(loss, cell.trainable_variables, tensors, rng)


CASES = {
    "plain": {},
    "loop": {"activation": tanh(), "way": "loop"},
    "masked": {"mask": GAPS},
    "masked loop": {"mask": GAPS, "activation": tanh(), "way": "loop"},
    "backwards": {"go_backwards": True, "mask": GAPS},
    "no bias": {"use_bias": False},
    "time first": {"time_major": True, "mask": GAPS},
    "stateful": {"stateful": True},
    "unrolled": {"unroll": True, "activation": tanh()},
    "peephole": {"cell": PeepholeCell},
    "last step": {"return_sequences": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_a_layer(rng, case):
    """By the weights, the sequence and the initial states."""
    arguments = {"return_sequences": True, **CASES[case]}
    way, mask = arguments.pop("way", None), arguments.pop("mask", None)
    cell = arguments.pop("cell", None)
    with double_precision(), recurrence.only(way):
        if cell:
            arguments["cell"] = cell(3, tanh(), dtype="float64")
        else:
            arguments["units"] = 3
        layer = ScratchLSTM(**arguments, return_state=True, dtype="float64")
        x = rng.normal(size=(3, 4, 2))
        if layer.time_major:
            x, mask = x.swapaxes(0, 1), mask.swapaxes(0, 1)
        states = [rng.normal(size=(3, 3)) for _ in "hc"]
        layer.build(x.shape)
        weights = [rng.normal(size=output.shape) for output in layer(x)]

        def loss(x, *states):
            outputs = layer(x, initial_state=list(states), mask=mask)
            pairs = zip(outputs, weights, strict=True)
            return sum(ops.sum(output * weight) for output, weight in pairs)

        assert_gradients(loss, layer.trainable_variables, [x, *states], rng)


# --- gate by gate ------------------------------------------------------------


def after_a_step(rng, change=lambda cell: None, rate=0.5, **arguments):
    """The weights of a cell by name, before and after a step of SGD in `fit`."""
    keras.utils.set_random_seed(3)
    layer = ScratchLSTM(6, bias_initializer="random_normal", **arguments)
    model = keras.Sequential([keras.Input((7, 5)), layer, layers.Dense(1)])
    change(layer.cell)
    before = dict(zip(NAMES, layer.get_weights(), strict=True))
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(x, y, batch_size=8, verbose=0)
    return before, dict(zip(NAMES, layer.get_weights(), strict=True))
