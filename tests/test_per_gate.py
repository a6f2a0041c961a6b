import keras
import numpy as np
import pytest
from gradients import BACKEND
from keras import layers
from reference import NAMES

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, per_gate

numpy = keras.ops.convert_to_numpy


@pytest.mark.parametrize("use_bias", [True, False])
def test_named_weights(use_bias):
    """The same for both cells, and `fuse` is the inverse for the built-in one."""
    pairs = []
    for make in (ScratchLSTMCell, layers.LSTMCell):
        keras.utils.set_random_seed(3)
        cell = make(4, use_bias=use_bias, bias_initializer="random_normal")
        cell.build((None, 3))
        pairs.append(per_gate.named_weights(cell))
    ours, theirs = pairs
    names = [name for name in per_gate.WEIGHT_NAMES if use_bias or name[0] == "W"]
    assert [name for name, _ in ours] == [name for name, _ in theirs] == names
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
    for weight, prefix in zip(cell.weights, ("W_x", "W_h", "b_"), strict=False):
        fused = per_gate.fuse([one for name, one in ours if name.startswith(prefix)])
        np.testing.assert_array_equal(numpy(fused), numpy(weight))


FORGET_GATE = ["W_xf", "W_hf", "b_f"]
OF_SOME_GATES = ["W_xf", "W_hi", "b_o"]


def test_training_per_gate(rng):
    """A frozen gate, and a regularizer and a constraint, affect their gates only."""
    x, y = rng.normal(size=(8, 7, 5)), rng.normal(size=(8, 1))

    def train(change=lambda layer: None, **arguments):
        """One SGD step in `fit`; returns the weights by name, before and after."""
        keras.utils.set_random_seed(3)
        arguments |= {"bias_initializer": keras.initializers.RandomNormal(stddev=0.5)}
        layer = ScratchLSTM(6, unit_forget_bias=False, **arguments)
        model = keras.Sequential([keras.Input((7, 5)), layer, layers.Dense(1)])
        change(layer)
        optimizer = keras.optimizers.SGD(0.5)
        model.compile(optimizer, "mse", run_eagerly=BACKEND == "tensorflow")
        weights = [layer.get_weights()]
        model.fit(x, y, batch_size=8, verbose=0)
        weights.append(layer.get_weights())
        return [dict(zip(NAMES, values, strict=True)) for values in weights]

    def freeze(layer):
        for name in ("W_xi", *FORGET_GATE):
            getattr(layer.cell, name).trainable = False
        layer.cell.W_xi.trainable = True  # again, before `compile`

    before, plain = train()
    _, frozen = train(freeze)
    _, regularized = train(
        kernel_regularizer={"f": keras.regularizers.L2(0.1)},
        recurrent_regularizer={"i": keras.regularizers.L2(0.2)},
        bias_regularizer={"o": keras.regularizers.L2(0.3)},
    )
    _, constrained = train(
        kernel_constraint={"f": "non_neg"},
        recurrent_constraint={"i": "non_neg"},
        bias_constraint={"o": "non_neg"},
    )
    rates = dict(zip(OF_SOME_GATES, (0.1, 0.2, 0.3), strict=True))
    for name, old in before.items():
        new = plain[name]
        assert not np.allclose(old, new)
        assert new.min() < 0
        expected = old if name in FORGET_GATE else new
        np.testing.assert_allclose(frozen[name], expected, atol=1e-6)
        expected = new - 0.5 * 2 * rates.get(name, 0) * old
        np.testing.assert_allclose(regularized[name], expected, atol=1e-6)
        expected = new.clip(0) if name in OF_SOME_GATES else new
        np.testing.assert_allclose(constrained[name], expected, atol=1e-6)
