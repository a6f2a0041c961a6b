"""Comparison of the converted cells with those of TensorFlow Addons."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_scratch_lstm import from_addons, trace_gates

ADDONS = Path(__file__).with_name("addons.npz")  # written by make_addons.py


def addons(name):
    """Inputs, outputs and weights of a cell."""
    with np.load(ADDONS) as file:
        prefix = f"{name}LSTMCell/"
        weights = [file[key] for key in file if re.match(prefix + r"\d", key)]
        return file["x"], file[f"{prefix}outputs"], weights


@pytest.mark.parametrize("name", ["Peephole", "LayerNorm"])
def test_converted_cell_matches_addons(name, tmp_path):
    x, outputs, weights = addons(name)
    layer = from_addons(weights, return_sequences=True)
    assert layer.count_params() == sum(weight.size for weight in weights)
    model = keras.Sequential([keras.Input((6, 3)), layer])
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-6)

    model.save(tmp_path / "model.keras")
    trace = trace_gates(keras.saving.load_model(tmp_path / "model.keras"), x)
    np.testing.assert_allclose(trace.h, outputs, atol=1e-6)
    np.testing.assert_allclose(trace.o * np.tanh(trace.c), outputs, atol=1e-6)
    with pytest.raises(ValueError, match="would lose its converted weights"):
        keras.layers.Bidirectional(layer)


@pytest.mark.parametrize("name", ["Peephole", "LayerNorm"])
def test_arguments_and_weights_without_bias(name):
    x, _, (kernel, recurrent, bias, *others) = addons(name)
    arguments = {"activation": "relu", "go_backwards": True, "dtype": "float32"}
    layer = from_addons([kernel, recurrent, *others], **arguments)
    zeros = from_addons([kernel, recurrent, 0 * bias, *others], **arguments)
    assert (layer.activation, layer.go_backwards) == (keras.activations.relu, True)
    outputs = [ops.convert_to_numpy(one(x)) for one in (layer, zeros)]
    assert np.ptp(outputs[0]) > 0
    np.testing.assert_allclose(*outputs, atol=1e-6)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "change",
    [
        lambda weights: 1,
        lambda weights: weights[:-1],
        lambda weights: [weights[1], *weights[1:2], *weights[2:-1], weights[0]],
        lambda weights: [weight.astype(str) for weight in weights],
        lambda weights: [[[1], [2, 3]], *weights[1:]],
    ],
)
def test_other_weights_are_rejected(change):
    with pytest.raises(ValueError, match=r"`weights` must be the weights of a `tfa"):
        from_addons(change(addons("Peephole")[2]))
