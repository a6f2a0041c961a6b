import keras
import numpy as np
import pytest
from keras import layers

from keras_scratch_lstm import ScratchLSTMCell, per_gate

numpy = keras.ops.convert_to_numpy


def test_split_initializer_draws_once():
    shapes = []

    def draw(shape, dtype=None):
        shapes.append(shape)
        return np.arange(np.prod(shape), dtype=dtype).reshape(shape)

    initializers = per_gate.split_initializer(draw, units=2)
    parts = [initializers[gate]((3, 2), dtype="float32") for gate in "ifco"]
    assert shapes == [(3, 8)]
    fused = np.concatenate([np.array(part) for part in parts], axis=1)
    np.testing.assert_array_equal(fused, np.arange(24).reshape(3, 8))


def test_serialize_is_the_inverse_of_resolve():
    one = keras.initializers.Constant(2.0)
    module = keras.initializers
    for given in (one, {"f": one}):
        resolved = per_gate.resolve("name", given, module.get, "zeros")
        config = per_gate.serialize(resolved, module.serialize)
        assert per_gate.is_per_gate(config) == (given is not one)
        restored = per_gate.resolve("name", config, module.get)
        assert per_gate.serialize(restored, module.serialize) == config
        assert per_gate.pick(restored, "f").value == 2


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
