"""State trees and layouts, which key a model's variables by their path."""

import json
import os

import keras
import numpy as np
import pytest
from keras import layers
from reference import fuse, run_python

from keras_scratch_lstm import ScratchLSTM
from keras_scratch_lstm._keras import all_layers

BACKEND = keras.backend.backend()
BATCH, TIME, FEATURES, UNITS = 3, 5, 2, 4

INPUT = (BATCH, TIME, FEATURES)
# `LSTM` is ours or the built-in one.
MODELS = {
    "stacked": lambda LSTM: [
        keras.Sequential(
            [
                keras.Input(batch_shape=INPUT),
                LSTM(UNITS, stateful=True, return_sequences=True, name="lower"),
            ],
            name="inner",
        ),
        LSTM(UNITS, stateful=True, name="upper"),
    ],
    "bidirectional": lambda LSTM: [
        layers.Bidirectional(LSTM(UNITS, stateful=True, name="lstm"), name="both")
    ],
}


def make_model(kind, LSTM=ScratchLSTM):
    inputs = keras.Input(batch_shape=INPUT)
    head = layers.Dense(1, name="dense")
    model = keras.Sequential([inputs, *MODELS[kind](LSTM), head], name="model")
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, name="sgd")
    model.compile(optimizer, "mse", run_eagerly=BACKEND == "tensorflow")
    return model


def reset_states(model):
    for layer in all_layers(model):
        if isinstance(layer, layers.RNN) and layer.stateful:
            layer.reset_state()


def as_builtin(model):
    """The weights of a model of our layers, in the order of the built-in layers."""
    *gates, kernel, bias = model.get_weights()
    fused = [fuse(gates[k : k + 12]) for k in range(0, len(gates), 12)]
    return [weight for weights in fused for weight in weights] + [kernel, bias]


def call(model, x):
    return keras.ops.convert_to_numpy(model(x))


@pytest.fixture
def batches(rng):
    return rng.normal(size=(3, *INPUT)).astype("float32")


@pytest.mark.parametrize("kind", MODELS)
def test_state_tree_restores_weights_states_and_optimizer(kind, batches):
    """In a new model, with the outputs of the built-in layer as the right values."""
    first, second, third = batches
    model, restored = make_model(kind), make_model(kind)
    expected = make_model(kind, layers.LSTM)
    model.fit(first, np.ones(BATCH), BATCH, verbose=0)
    assert len({v.path for v in model.variables}) == len(model.variables)
    expected.set_weights(as_builtin(model))
    for each in (model, expected):
        reset_states(each)
        each(second)
    tree = model.get_state_tree("numpy_array")
    restored.fit(first, np.ones(BATCH), BATCH, verbose=0)  # creates the slots
    restored.set_state_tree(tree)
    found, right = call(restored, third), call(expected, third)
    np.testing.assert_allclose(found, right, 1e-5, 1e-6)
    model(third)
    for each in (model, restored):
        reset_states(each)
        each.fit(third, np.ones(BATCH), BATCH, verbose=0)
    for weight, other in zip(model.weights, restored.weights, strict=True):
        np.testing.assert_allclose(
            weight.numpy(), other.numpy(), 1e-5, 1e-6, err_msg=weight.path
        )


DISTRIBUTED = """
import json

import keras
import numpy as np
from keras import distribution, layers, ops

from keras_scratch_lstm import ScratchLSTM

devices = distribution.list_devices()
assert len(devices) == 4
layout = distribution.LayoutMap(
    distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
)
layout[".*W_[xh].$"] = (None, "model")
layout[".*b_.$"] = ("model",)
DISTRIBUTIONS = {
    "none": None,
    "data": distribution.DataParallel(devices=devices),
    "model": distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"),
}
rng = np.random.default_rng(0)
x, y = rng.normal(size=(16, 5, 2)).astype("float32"), np.ones((16, 1), "float32")


def train(how, stateful):
    distribution.set_distribution(DISTRIBUTIONS[how])
    keras.utils.set_random_seed(1)
    kwargs = {"stateful": stateful, "name": "lstm"}
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(8, 5, 2)),
            layers.Bidirectional(ScratchLSTM(4, return_sequences=True, **kwargs)),
            ScratchLSTM(4, **kwargs),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    shards = {
        weight.path: len({str(s.index) for s in weight.value.addressable_shards})
        for weight in model.weights
    }
    weights = [ops.convert_to_numpy(weight).tolist() for weight in model.weights]
    return history.history, weights, shards


print(json.dumps([[train(how, s) for how in DISTRIBUTIONS] for s in (False, True)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has virtual devices")
def test_distributed_training_matches_one_device():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    printed = run_python("-c", DISTRIBUTED, KERAS_BACKEND="jax", XLA_FLAGS=flags)
    for expected, data, model in json.loads(printed.splitlines()[-1]):
        for history, weights, _ in (data, model):
            for name, values in history.items():
                np.testing.assert_allclose(values, expected[0][name], 1e-4)
            for weight, right in zip(weights, expected[1], strict=True):
                np.testing.assert_allclose(weight, right, 1e-4, 1e-6)
        for path, shards in model[2].items():
            named_weight = path.split("/")[-1].startswith(("W_", "b_"))
            assert shards == (2 if named_weight else 1), path
