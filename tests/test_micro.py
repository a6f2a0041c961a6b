"""Files of `export_litert` in LiteRT Micro, with its x86 kernels."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_scratch_lstm import ScratchLSTM, export_litert, to_scratch

if keras.backend.backend() != "tensorflow":
    pytest.skip("the converter is part of TensorFlow", allow_module_level=True)
tflite_micro = pytest.importorskip(
    "tflite_micro", reason="no wheel of `tflite-micro` for this Python"
)

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]
TIME, FEATURES = 12, 8


def load(file):
    return tflite_micro.runtime.Interpreter.from_file(str(file.path))


def run(interpreter, *inputs):
    """The first output of one invocation."""
    for k, x in enumerate(inputs):
        interpreter.set_input(x, k)
    interpreter.invoke()
    return interpreter.get_output(0)


def run_sequences(interpreter, data):
    """The outputs of many sequences, each with fresh states."""
    outputs = []
    for k in range(len(data[0])):
        outputs.append(run(interpreter, *(array[k : k + 1] for array in data)))
        interpreter.reset()
    return np.concatenate(outputs)


def sequential(*parts):
    return keras.Sequential([keras.Input((TIME, FEATURES)), *parts])


def with_two_inputs():
    sequence, scalars = keras.Input((TIME, FEATURES)), keras.Input((3,))
    h = layers.LSTM(16)(sequence)
    outputs = layers.Dense(4)(layers.concatenate([h, scalars]))
    return keras.Model([sequence, scalars], outputs)


MODELS = {
    "plain": lambda: sequential(layers.LSTM(16), layers.Dense(4, "softmax")),
    "stacked": lambda: sequential(
        ScratchLSTM(16, return_sequences=True), ScratchLSTM(8, use_bias=False)
    ),
    "bidirectional": lambda: sequential(
        layers.Bidirectional(layers.LSTM(16, return_sequences=True)), layers.Dense(4)
    ),
    "convolution": lambda: sequential(
        layers.Conv1D(8, 3, activation="relu"), layers.MaxPooling1D(), ScratchLSTM(16)
    ),
    "two inputs": with_two_inputs,
}


@pytest.mark.parametrize(
    ("name", "quantize"),
    [*((name, "int8") for name in MODELS), ("stacked", None), ("two inputs", None)],
)
def test_many_sequences(tmp_path, rng, name, quantize):
    model = MODELS[name]()
    shapes = [(40, *inputs.shape[1:]) for inputs in model.inputs]
    data = [rng.normal(size=shape).astype("float32") for shape in shapes]
    options = {"representative_data": data, "verbose": False}
    file = export_litert(model, tmp_path / "model.tflite", quantize=quantize, **options)
    found = run_sequences(load(file), data)
    expected = model.predict(data if len(data) > 1 else data[0], verbose=0)
    bound = 0.1 if quantize else 1e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    assert abs(np.abs(found - expected).max() - file.largest_difference) < bound


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_streaming(tmp_path, rng, quantize):
    """Each invocation is one time step; `Reset` ends the sequence."""
    model = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            ScratchLSTM(16, return_sequences=True),
            ScratchLSTM(8, return_sequences=True),
        ]
    )
    x = rng.normal(size=(20, 30, FEATURES)).astype("float32")
    steps = x.reshape(-1, 1, FEATURES)  # calibration also keeps the states
    options = {"representative_data": steps, "verbose": False}
    file = export_litert(model, tmp_path / "step.tflite", quantize=quantize, **options)
    interpreter = load(file)
    expected = model.predict(x[:3], verbose=0)
    for sequence, outputs in zip(x[:3], expected, strict=True):
        found = [run(interpreter, x_t[None, None])[0, 0] for x_t in sequence]
        interpreter.reset()
        bound = 0.1 if quantize else 1e-6
        np.testing.assert_allclose(found, outputs, rtol=0, atol=bound)


def test_states_are_kept_until_reset(tmp_path, rng):
    model = sequential(ScratchLSTM(16))
    file = export_litert(model, tmp_path / "model.tflite", verbose=False)
    interpreter = load(file)
    x = rng.normal(size=(1, TIME, FEATURES)).astype("float32")
    first, second = run(interpreter, x), run(interpreter, x)
    interpreter.reset()
    np.testing.assert_array_equal(run(interpreter, x), first)
    assert np.abs(second - first).max() > 1e-3


def test_four_layers_and_100_time_steps(tmp_path, rng):
    """Keras's own export of this model does not finish (tflite-micro #3674)."""
    model = keras.Sequential([keras.Input((100, 32))])
    for k in range(4):
        model.add(layers.LSTM(128, return_sequences=k < 3))
    model.add(layers.Dense(3))
    x = rng.normal(size=(10, 100, 32)).astype("float32")
    options = {"representative_data": x, "verbose": False}
    file = export_litert(model, tmp_path / "model.tflite", quantize="int8", **options)
    found = run_sequences(load(file), [x[:3]])
    expected = model.predict(x[:3], verbose=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


def embedding():
    parts = layers.Embedding(9, 4), ScratchLSTM(3)
    return keras.Sequential([keras.Input((5,), dtype="int32"), *parts])


@pytest.mark.parametrize(
    ("make", "quantize"),
    [(MODELS["plain"], "float16"), (embedding, None)],
    ids=["float16", "Embedding"],
)
def test_files_that_do_not_run(tmp_path, make, quantize):
    """The summary says so, and LiteRT Micro rejects them."""
    options = {"quantize": quantize, "verbose": False}
    file = export_litert(make(), tmp_path / "model.tflite", **options)
    assert file.micro == ()
    assert "LiteRT Micro: no" in str(file)
    with pytest.raises(RuntimeError, match="failed to allocate"):
        load(file)


def test_dynamic_files_do_not_run(tmp_path, rng):
    """LiteRT Micro loads them, and its outputs are wrong."""
    model = to_scratch(keras.Sequential([keras.Input((5, 48)), layers.LSTM(64)]))
    path = tmp_path / "model.tflite"
    file = export_litert(model, path, quantize="dynamic", verbose=False)
    assert file.micro == ()
    x = rng.normal(size=(1, 5, 48)).astype("float32")
    found, expected = run(load(file), x), model.predict(x, verbose=0)
    assert not np.allclose(found, expected, atol=0.1)
