import keras
import numpy as np
import pytest

from keras_scratch_lstm import per_gate


def test_one_draw_serves_all_gates():
    shapes = []

    def draw(shape, dtype=None):
        shapes.append(shape)
        return np.arange(np.prod(shape), dtype=dtype).reshape(shape)

    initializers = per_gate.split_initializer(draw, units=2)
    parts = [initializers[gate]((3, 2), dtype="float32") for gate in "ifco"]
    assert shapes == [(3, 8)]
    fused = np.concatenate([np.array(part) for part in parts], axis=1)
    np.testing.assert_array_equal(fused, np.arange(24).reshape(3, 8))


def test_a_serialized_object_is_no_choice_by_gate():
    config = keras.initializers.serialize(keras.initializers.Constant(2.0))
    assert not per_gate.is_per_gate(config)
    resolved = per_gate.resolve("name", config, keras.initializers.get)
    assert isinstance(resolved, keras.initializers.Constant)
    assert per_gate.is_per_gate({"i": config})


def test_serialize_undoes_resolve():
    given = {"f": "l2"}
    resolved = per_gate.resolve("name", given, keras.regularizers.get)
    assert list(resolved) == list(per_gate.GATES)
    config = per_gate.serialize(resolved, keras.regularizers.serialize)
    assert config["i"] is None
    again = per_gate.resolve("name", config, keras.regularizers.get)
    assert per_gate.serialize(again, keras.regularizers.serialize) == config


def test_unknown_gate():
    with pytest.raises(ValueError, match=r"^`name` names the gate 'x'; expected a"):
        per_gate.resolve("name", {"i": "l2", "x": "l1"}, keras.regularizers.get)
