"""Gradients against finite differences, and training per gate."""

import keras
import numpy as np
import pytest
from custom_cells import PeepholeCell
from gradients import BACKEND, double_precision, with_gradients
from keras import layers, ops
from reference import NAMES

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence


def tanh():
    """On JAX, `keras.activations.tanh` computes in float32."""
    if BACKEND != "jax":
        return "tanh"
    import jax

    return jax.numpy.tanh


def weighted_sum(tensors, weights):
    weights = [ops.convert_to_tensor(weight, "float64") for weight in weights]
    return sum(ops.sum(t * weight) for t, weight in zip(tensors, weights, strict=True))


def assert_gradients(function, variables, tensors, rng):
    """Compare gradients with central differences in a random direction each."""

    def loss_and_itself(*tensors):
        loss = function(*tensors)
        return loss, loss

    def value(*tensors):
        return float(
            ops.convert_to_numpy(function(*map(ops.convert_to_tensor, tensors)))
        )

    evaluate, step = with_gradients(loss_and_itself, variables), 1e-5
    if BACKEND == "jax":  # where the compiled function is faster

        def value(*tensors):
            return float(evaluate(*tensors)[0])

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
            losses.append(value(*moved))
            if k < len(variables):
                variables[k].assign(before)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert abs(gradient).max() > 1e-4  # a gradient to compare
        np.testing.assert_allclose((gradient * direction).sum(), slope, atol=1e-8)


GAPS = np.array([[1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]], bool)
CASES = {
    "masked": {"mask": GAPS},
    "backwards loop": {"mask": GAPS, "go_backwards": True, "implementation": "loop"},
    "no bias": {"use_bias": False, "return_sequences": False},
    "time-major": {"time_major": True, "mask": GAPS},
    "stateful": {"stateful": True},
    "unrolled": {"unroll": True},
    "custom cell": {"cell": PeepholeCell},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_layer(rng, case):
    """By the weights, the inputs and the initial states."""
    arguments = {"return_sequences": True, **CASES[case]}
    implementation = arguments.pop("implementation", None)
    mask = arguments.pop("mask", None)
    cell = arguments.pop("cell", ScratchLSTMCell)
    use_bias = arguments.pop("use_bias", True)
    with double_precision(), recurrence.force(implementation):
        activation = "tanh" if case in ("masked", "no bias") else tanh()
        cell = cell(3, activation, use_bias=use_bias, dtype="float64")
        layer = ScratchLSTM(cell=cell, **arguments, return_state=True, dtype="float64")
        x = rng.normal(size=(3, 4, 2))
        if layer.time_major:
            x, mask = x.swapaxes(0, 1), mask.swapaxes(0, 1)
        states = [rng.normal(size=(3, 3)) for _ in "hc"]
        layer.build(x.shape)
        weights = [rng.normal(size=output.shape) for output in layer(x)]

        def loss(x, *states):
            outputs = layer(x, initial_state=list(states), mask=mask)
            return weighted_sum(outputs, weights)

        assert_gradients(loss, layer.trainable_variables, [x, *states], rng)


# --- per gate ----------------------------------------------------------------

FORGET_GATE = ["W_xf", "W_hf", "b_f"]
OF_SOME_GATES = ["W_xf", "W_hi", "b_o"]


@pytest.fixture
def train(rng):
    """One SGD step in `fit`; returns the weights by name, before and after."""
    x, y = rng.normal(size=(8, 7, 5)), rng.normal(size=(8, 1))

    def train(change=lambda layer: None, **arguments):
        keras.utils.set_random_seed(3)
        layer = ScratchLSTM(
            6,
            bias_initializer=keras.initializers.RandomNormal(stddev=0.5),
            unit_forget_bias=False,
            **arguments,
        )
        model = keras.Sequential([keras.Input((7, 5)), layer, layers.Dense(1)])
        change(layer)
        optimizer = keras.optimizers.SGD(0.5)
        model.compile(optimizer, "mse", run_eagerly=BACKEND == "tensorflow")
        weights = [layer.get_weights()]
        model.fit(x, y, batch_size=8, verbose=0)
        weights.append(layer.get_weights())
        return [dict(zip(NAMES, values, strict=True)) for values in weights]

    return train


def test_frozen_gate_does_not_train(train):
    _, unfrozen = train()

    def freeze(layer):
        for name in ("W_xi", *FORGET_GATE):
            getattr(layer.cell, name).trainable = False
        layer.cell.W_xi.trainable = True  # again, before `compile`

    before, after = train(freeze)
    for name in NAMES:
        expected = before if name in FORGET_GATE else unfrozen
        np.testing.assert_allclose(after[name], expected[name], atol=1e-6)
        assert not np.allclose(before[name], unfrozen[name])


def test_per_gate_regularizer_affects_its_gate_only(train):
    _, plain = train()
    rates = dict(zip(OF_SOME_GATES, (0.1, 0.2, 0.3), strict=True))
    before, after = train(
        kernel_regularizer={"f": keras.regularizers.L2(0.1)},
        recurrent_regularizer={"i": keras.regularizers.L2(0.2)},
        bias_regularizer={"o": keras.regularizers.L2(0.3)},
    )
    for name in NAMES:
        expected = plain[name] - 0.5 * 2 * rates.get(name, 0) * before[name]
        np.testing.assert_allclose(after[name], expected, atol=1e-6)
        assert abs(before[name]).max() > 0.01


def test_per_gate_constraint_affects_its_gate_only(train):
    _, plain = train()
    _, after = train(
        kernel_constraint={"f": "non_neg"},
        recurrent_constraint={"i": "non_neg"},
        bias_constraint={"o": "non_neg"},
    )
    for name in NAMES:
        expected = plain[name].clip(0) if name in OF_SOME_GATES else plain[name]
        np.testing.assert_allclose(after[name], expected, atol=1e-6)
        assert plain[name].min() < 0
