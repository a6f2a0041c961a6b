"""Files: `.keras`, weights, exports, and from one backend to another."""

import json
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from custom_cells import CoupledCell
from keras import layers, ops
from reference import assert_close, run_python

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

BACKEND = keras.backend.backend()
# All of them in a circle.
OTHER = {"tensorflow": "torch", "torch": "jax", "jax": "tensorflow"}.get(BACKEND)
BATCH, TIME, FEATURES = 4, 7, 3
numpy = ops.convert_to_numpy


# Every argument of the layer, with no value at its default.
CELL_ARGUMENTS = {
    "units": 5,
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "use_bias": False,
    "kernel_initializer": {"c": keras.initializers.HeNormal(seed=3)},
    "recurrent_initializer": "glorot_normal",
    "bias_initializer": {"f": keras.initializers.Constant(2.0)},
    "unit_forget_bias": False,
    "kernel_regularizer": "l1",
    "recurrent_regularizer": {"f": keras.regularizers.L2(0.1)},
    "bias_regularizer": "l2",
    "kernel_constraint": {"i": keras.constraints.MaxNorm(3)},
    "recurrent_constraint": "unit_norm",
    "bias_constraint": {"o": "non_neg"},
    "dropout": 0.1,
    "recurrent_dropout": 0.2,
    "seed": 11,
    "dtype": "float64",
    "name": "one",
}
ARGUMENTS = CELL_ARGUMENTS | {
    "activity_regularizer": "l2",
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": True,
    "use_cudnn": False,
    "time_major": True,
}
# Not in the models below. On torch, Keras cannot unroll backwards with a mask.
NOT_IN_MODELS = ["use_bias", "return_state", "stateful", "unroll"]
NOT_IN_MODELS += ["time_major", "dtype"]


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (ScratchLSTMCell, CELL_ARGUMENTS),
        (ScratchLSTM, ARGUMENTS),
        (ScratchLSTM, {"cell": CoupledCell(5, dropout=0.25), "time_major": True}),
    ],
    ids=["cell", "layer", "custom cell"],
)
def test_configuration_round_trip(make, arguments):
    layer = make(**arguments)
    config = json.loads(json.dumps(layer.get_config()))
    before = json.dumps(config)
    assert set(arguments) <= set(config)
    for name, value in arguments.items():
        for gate, one in value.items() if isinstance(value, dict) else ():
            if not isinstance(one, str):
                assert config[name][gate]["class_name"] == type(one).__name__
    restored = make.from_config(config)
    assert json.dumps(config) == before  # unchanged
    assert restored.get_config() == config
    name = keras.saving.get_registered_name(make)
    assert name == f"keras_scratch_lstm>{make.__name__}"
    if make is ScratchLSTM:
        assert type(restored.cell) is type(layer.cell)
        for name in set(CELL_ARGUMENTS) - {"name", "dtype"}:
            assert getattr(layer, name) == getattr(layer.cell, name)


LAYERS = {
    "arguments": lambda: ScratchLSTM(
        **{name: one for name, one in ARGUMENTS.items() if name not in NOT_IN_MODELS}
    ),
    "custom cell": lambda: ScratchLSTM(cell=CoupledCell(5)),
    "bidirectional": lambda: layers.Bidirectional(ScratchLSTM(5), merge_mode="sum"),
    "time distributed": lambda: layers.TimeDistributed(
        layers.RNN([ScratchLSTMCell(5, use_bias=False), ScratchLSTMCell(4)])
    ),
}
PORTABLE = ["arguments", "bidirectional", "time distributed"]


def of_layer(layer, rng):
    """A model with random weights, biases included."""
    deep = isinstance(layer, layers.TimeDistributed)
    inputs = keras.Input((2, TIME, FEATURES) if deep else (TIME, FEATURES))
    x = inputs if deep else layers.Masking()(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layer(x)))
    for weight in model.weights:
        if "seed" not in weight.name:
            weight.assign(rng.normal(0, 0.5, weight.shape))
    return model


def configs(model):
    """The configurations of its layers, as JSON."""

    def without_shapes(config):  # which Keras adds when loading
        return {key: one for key, one in config.items() if key != "build_config"}

    text = json.dumps([layer.get_config() for layer in model.layers])
    return json.loads(text, object_hook=without_shapes)


def inputs_of(model, rng):
    x = rng.normal(size=(BATCH, *model.input_shape[1:])).astype("float32")
    x[1, ..., 2:4, :] = 0  # masked
    return x


@pytest.mark.parametrize("kind", LAYERS)
def test_files_and_configuration_round_trip(tmp_path, rng, kind):
    model = of_layer(LAYERS[kind](), rng)
    x = inputs_of(model, rng)
    expected = numpy(model(x))
    assert np.ptp(expected) > 0
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    of_config = keras.Model.from_config(json.loads(json.dumps(model.get_config())))
    of_config.load_weights(tmp_path / "model.weights.h5")
    for again in (loaded, of_config):
        assert configs(again) == configs(model)
        names = [weight.name for weight in model.weights]
        assert [weight.name for weight in again.weights] == names
        np.testing.assert_array_equal(numpy(again(x)), expected)


LOAD_AND_PREDICT = """
import sys
import keras, numpy as np
import keras_scratch_lstm
folder, *names = sys.argv[1:]
for name in names:
    model = keras.saving.load_model(f"{folder}/{name}.keras")
    x = np.load(f"{folder}/{name}.npy")
    np.save(f"{folder}/{name}.predictions.npy", model.predict(x, verbose=0))
"""


@pytest.mark.slow
def test_keras_file_loads_on_another_backend(tmp_path, rng):
    if not find_spec(OTHER):
        pytest.skip(f"{OTHER} is not installed")
    expected = {}
    for name in PORTABLE:
        model = of_layer(LAYERS[name](), rng)
        x = inputs_of(model, rng)
        model.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", x)
        expected[name] = model.predict(x, verbose=0)
    run_python("-c", LOAD_AND_PREDICT, tmp_path, *PORTABLE, KERAS_BACKEND=OTHER)
    for name in PORTABLE:
        predictions = np.load(tmp_path / f"{name}.predictions.npy")
        np.testing.assert_allclose(predictions, expected[name], rtol=0, atol=1e-5)


# Exported in each format in which Keras exports the built-in layer.
def exported_layer():
    """A fast implementation, and the loop of a custom cell."""
    backward = ScratchLSTM(cell=CoupledCell(5), go_backwards=True)
    return layers.Bidirectional(ScratchLSTM(5), backward_layer=backward)


@pytest.mark.skipif(BACKEND == "torch", reason="nor can the built-in layer, on torch")
@pytest.mark.filterwarnings("ignore:The `native_serialization`:DeprecationWarning")
@pytest.mark.ci
def test_saved_model_and_its_gradient(tmp_path, rng):
    """The backward pass of a SavedModel is in another graph than its forward pass."""
    tf = pytest.importorskip("tensorflow")
    model = of_layer(exported_layer(), rng)
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    x = tf.constant(inputs_of(model, rng))
    for inputs in (x, x[:1]):
        assert_close(loaded.serve(inputs), model(inputs.numpy()))
    if BACKEND != "tensorflow":
        return
    gradients = []
    for call in (loaded.serve, tf.function(model), model):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(call(x)))
        gradients.append(tape.gradient(loss, x).numpy())
    assert np.ptp(gradients[-1]) > 0
    for gradient in gradients[:-1]:
        np.testing.assert_allclose(gradient, gradients[-1], rtol=0, atol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="see `test_export_table.py`")
@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")
@pytest.mark.ci
def test_onnx_export(tmp_path, rng):
    exported = of_layer(exported_layer(), rng)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    path = str(tmp_path / "model.onnx")
    exported(inputs_of(exported, rng))  # Keras requires a call
    exported.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    (name,) = (one.name for one in session.get_inputs())
    for batch_size in (BATCH, 1):
        x = inputs_of(exported, rng)[:batch_size]
        assert_close(session.run(None, {name: x}), exported(x))


@pytest.mark.skipif(BACKEND != "torch", reason="a format of torch")
def test_torch_export(tmp_path, rng):
    exported = of_layer(exported_layer(), rng)
    torch = pytest.importorskip("torch")
    exported.export(tmp_path / "model.pt2", format="torch", verbose=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = inputs_of(exported, rng)[:1]  # Keras exports it for a batch size of 1
    assert_close(program(torch.tensor(x)).detach(), exported(x))
