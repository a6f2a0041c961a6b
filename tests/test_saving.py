"""Files: `.keras`, weights, exports, and from one backend to another."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

BACKEND = keras.backend.backend()
OTHERS = sorted({"tensorflow", "jax", "torch"} - {BACKEND})
BATCH, TIME, FEATURES = 4, 7, 3
numpy = ops.convert_to_numpy


@keras.saving.register_keras_serializable("test_saving")
class CoupledCell(ScratchLSTMCell):
    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


def each_argument():
    """A layer without a default."""
    return ScratchLSTM(
        5,
        activation="softsign",
        recurrent_activation="hard_sigmoid",
        use_bias=True,
        kernel_initializer={"c": keras.initializers.HeNormal(seed=3)},
        recurrent_initializer="glorot_normal",
        bias_initializer={"f": keras.initializers.Constant(2.0)},
        unit_forget_bias=False,
        kernel_regularizer="l1",
        recurrent_regularizer={"f": keras.regularizers.L2(0.1)},
        bias_regularizer="l2",
        activity_regularizer="l2",
        kernel_constraint={"i": keras.constraints.MaxNorm(3)},
        recurrent_constraint="unit_norm",
        bias_constraint={"o": "non_neg"},
        dropout=0.1,
        recurrent_dropout=0.2,
        seed=11,
        return_sequences=True,
        go_backwards=True,
        use_cudnn=False,
    )


LAYERS = {
    "layer": lambda: ScratchLSTM(5, return_sequences=True),
    "cell": lambda: layers.RNN(ScratchLSTMCell(5), return_sequences=True),
    "each argument": each_argument,
    "own cell": lambda: ScratchLSTM(cell=CoupledCell(5)),
    "stack": lambda: layers.RNN([ScratchLSTMCell(5), ScratchLSTMCell(4)]),
    "bidirectional": lambda: layers.Bidirectional(ScratchLSTM(5), merge_mode="sum"),
    "time distributed": lambda: layers.TimeDistributed(
        layers.RNN(ScratchLSTMCell(5, use_bias=False))
    ),
}
# What is the same on every backend: files with code of a test's own are not.
PLAIN = sorted(set(LAYERS) - {"own cell"})


@pytest.fixture
def model(request, rng):
    return of_layer(LAYERS[request.param](), rng)


def of_layer(layer, rng):
    """A model with weights of which no two are alike."""
    deep = isinstance(layer, layers.TimeDistributed)
    inputs = keras.Input((2, TIME, FEATURES) if deep else (TIME, FEATURES))
    x = inputs if deep else layers.Masking()(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layer(x)))
    for weight in model.weights:
        if "seed" not in weight.name:
            weight.assign(rng.normal(0, 0.5, weight.shape))
    return model


def configs(model):
    """Of its layers, as in a file: a tuple is a list there."""

    def without_shapes(config):  # which Keras adds to what has been in a file
        return {key: one for key, one in config.items() if key != "build_config"}

    text = json.dumps([layer.get_config() for layer in model.layers])
    return json.loads(text, object_hook=without_shapes)


def inputs_of(model, rng):
    x = rng.normal(size=(BATCH, *model.input_shape[1:])).astype("float32")
    x[1, ..., 2:4, :] = 0  # masked
    return x


each_model = pytest.mark.parametrize("model", LAYERS, indirect=True)


@each_model
def test_a_model_file(tmp_path, rng, model):
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert configs(again) == configs(model)
    names = [weight.name for weight in model.weights]
    assert [weight.name for weight in again.weights] == names
    for one, other in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
    x = inputs_of(model, rng)
    expected = model.predict(x, verbose=0)
    assert np.ptp(expected) > 0
    np.testing.assert_array_equal(again.predict(x, verbose=0), expected)


@each_model
def test_a_weights_file(tmp_path, rng, model):
    model.save_weights(tmp_path / "model.weights.h5")
    again = keras.models.clone_model(model)
    x = inputs_of(model, rng)
    expected = model.predict(x, verbose=0)
    assert not np.allclose(again.predict(x, verbose=0), expected)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again.predict(x, verbose=0), expected)


@each_model
def test_a_config_as_json(model):
    again = keras.Model.from_config(json.loads(json.dumps(model.get_config())))
    assert configs(again) == configs(model)
    assert [tuple(weight.shape) for weight in again.weights] == [
        tuple(weight.shape) for weight in model.weights
    ]


def test_training_goes_on_after_loading(tmp_path, rng):
    """With the optimizer's state. (That of a dropout's seed, Keras leaves out.)"""
    model = of_layer(ScratchLSTM(5), rng)
    model.compile("adam", "mse")
    x, y = inputs_of(model, rng), rng.normal(size=(BATCH, 2)).astype("float32")
    model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, again):
        one.fit(x, y, epochs=3, shuffle=False, verbose=0)
    for one, other in zip(again.weights, model.weights, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=0, atol=1e-6)


def test_safe_mode_runs_no_lambda(tmp_path):
    layer = ScratchLSTM(5, activation=lambda x: x)
    model = keras.Sequential([keras.Input((TIME, FEATURES)), layer])
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        model.save(tmp_path / "model.keras")
    # As of the built-in layer, and without `safe_mode`, too.
    with pytest.raises((TypeError, ValueError), match="`activation` is"):
        keras.saving.load_model(tmp_path / "model.keras")


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


@pytest.mark.parametrize("other", OTHERS)
def test_saved_here_and_loaded_on(tmp_path, rng, other):
    if not find_spec(other):
        pytest.skip(f"{other} is not installed")
    expected = {}
    for name in PLAIN:
        model = of_layer(LAYERS[name](), rng)
        x = inputs_of(model, rng)
        model.save(tmp_path / f"{name}.keras")
        np.save(tmp_path / f"{name}.npy", x)
        expected[name] = model.predict(x, verbose=0)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PREDICT, str(tmp_path), *PLAIN],
        env={**os.environ, "KERAS_BACKEND": other},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in PLAIN:
        predictions = np.load(tmp_path / f"{name}.predictions.npy")
        np.testing.assert_allclose(predictions, expected[name], rtol=0, atol=1e-5)


# The exports that Keras 3.15 has of its own `LSTM`, on this backend.
EXPORTED = {
    "layer": lambda: ScratchLSTM(5, return_sequences=True),
    "cell": lambda: layers.RNN(ScratchLSTMCell(5)),
    "bidirectional": lambda: layers.Bidirectional(ScratchLSTM(5)),
    "own cell": lambda: ScratchLSTM(cell=CoupledCell(5)),
}


@pytest.fixture
def exported(request, rng):
    return of_layer(EXPORTED[request.param](), rng)


each_export = pytest.mark.parametrize("exported", EXPORTED, indirect=True)


def assert_same(outputs, model, x):
    expected = model.predict(x, verbose=0)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras's own LSTM can't, on torch")
@pytest.mark.filterwarnings("ignore:The `native_serialization`:DeprecationWarning")
@each_export
def test_exported_as_a_saved_model(tmp_path, rng, exported):
    tf = pytest.importorskip("tensorflow")
    exported.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    for batch_size in (BATCH, 1):
        x = inputs_of(exported, rng)[:batch_size]
        assert_same(loaded.serve(x).numpy(), exported, x)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a gradient of TensorFlow's")
@each_export
def test_an_exported_model_has_its_gradient(tmp_path, rng, exported):
    """In a graph of its own, so that the loop back reads copies."""
    import tensorflow as tf

    exported.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    x = tf.constant(inputs_of(exported, rng))
    gradients = []
    for model in (loaded.serve, tf.function(exported), exported):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(model(x)))
        gradients.append(tape.gradient(loss, x).numpy())
    assert np.ptp(gradients[-1]) > 0
    for gradient in gradients[:-1]:
        np.testing.assert_allclose(gradient, gradients[-1], rtol=0, atol=1e-5)


@pytest.mark.skipif(BACKEND == "jax", reason="Keras exports no ONNX from JAX")
@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*might cause the trace to be incorrect")
@pytest.mark.filterwarnings("ignore:torch.* results are registered as constants")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size")
@each_export
def test_exported_as_onnx(tmp_path, rng, exported):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx" if BACKEND == "tensorflow" else "onnxscript")
    path = str(tmp_path / "model.onnx")
    exported(inputs_of(exported, rng))  # Keras wants it called
    exported.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    (name,) = (one.name for one in session.get_inputs())
    for batch_size in (BATCH, 1):
        x = inputs_of(exported, rng)[:batch_size]
        assert_same(session.run(None, {name: x})[0], exported, x)


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own format")
@each_export
def test_exported_as_a_program_of_torch(tmp_path, rng, exported):
    torch = pytest.importorskip("torch")
    exported.export(tmp_path / "model.pt2", format="torch", verbose=False)
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = inputs_of(exported, rng)[:1]  # Keras makes it for a batch of 1
    assert_same(program(torch.tensor(x)).detach().numpy(), exported, x)
