"""Models that LiteRT's interpreter runs: operators, outputs, states, quantization."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence, to_scratch

if keras.backend.backend() != "tensorflow":
    pytest.skip("Keras exports to LiteRT on TensorFlow", allow_module_level=True)
pytest.importorskip("keras.src.export.litert", reason="Keras 3.13 or newer")
Interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
tf = pytest.importorskip("tensorflow")

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.filterwarnings("ignore:LiteRT's fused LSTM op keeps:UserWarning"),
]
FUSED = "UNIDIRECTIONAL_SEQUENCE_LSTM"


class CoupledCell(ScratchLSTMCell):
    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


class InTraining(layers.Wrapper):
    def call(self, x):
        return self.layer(x, training=True)


def export(model, path, shape, **kwargs):
    """The interpreter of an exported model."""
    signature = [keras.InputSpec(shape=shape, dtype="float32")]
    model.export(
        path, format="litert", input_signature=signature, verbose=False, **kwargs
    )
    return load(model_path=str(path))


def load(**kwargs):
    interpreter = Interpreter(**kwargs)
    interpreter.allocate_tensors()
    return interpreter


def operators(interpreter):
    names = [op["op_name"] for op in interpreter._get_ops_details()]
    return [name for name in names if name != "DELEGATE"]


def run(interpreter, *inputs, reset=True):
    """The outputs of one invocation."""
    if reset:
        interpreter.reset_all_variables()
    for details, value in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(details["index"], value)
    interpreter.invoke()
    outputs = interpreter.get_output_details()
    return [interpreter.get_tensor(details["index"]) for details in outputs]


def sequential(*parts, shape=(None, 3)):
    return keras.Sequential([keras.Input(shape), *parts])


def randomize(model, rng):
    model.set_weights([rng.normal(0, 0.5, w.shape) for w in model.get_weights()])


def normal(rng, *shape):
    return rng.normal(size=shape).astype("float32")


SUPPORTED = {
    "last output": lambda n: [ScratchLSTM(n)],
    "sequences": lambda n: [ScratchLSTM(n, return_sequences=True)],
    "backwards": lambda n: [ScratchLSTM(n, go_backwards=True, use_bias=False)],
    "stacked": lambda n: [ScratchLSTM(n, return_sequences=True), ScratchLSTM(n)],
    "bidirectional": lambda n: [
        layers.Bidirectional(ScratchLSTM(n, return_sequences=True)),
        layers.Dense(2),
    ],
}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=[] if name == "bidirectional" else pytest.mark.slow)
        for name, make in SUPPORTED.items()
    ],
    ids=SUPPORTED,
)
def test_each_direction_is_one_fused_op(tmp_path, rng, make):
    batch_size, time, features, units = rng.integers(1, 9, 4).tolist()
    model = sequential(*make(units), shape=(None, features))
    randomize(model, rng)
    shape = batch_size, time, features
    interpreter = export(model, tmp_path / "model.tflite", shape)
    names = operators(interpreter)
    directions = 2 if len(model.layers) == 2 else 1
    assert names.count(FUSED) == directions
    assert not {name for name in names if "WHILE" in name or "Flex" in name}
    for _ in range(3):
        x = normal(rng, *shape)
        expected = model.predict(x, verbose=0)
        (outputs,) = run(interpreter, x)
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_functional_time_major_and_shared_layers(tmp_path, rng):
    shared = ScratchLSTM(4, return_sequences=True, time_major=True)
    inputs = keras.Input(batch_shape=(6, 2, 4))
    model = keras.Model(inputs, shared(shared(inputs)))
    randomize(model, rng)
    interpreter = export(model, tmp_path / "model.tflite", (6, 2, 4))
    assert operators(interpreter) == [FUSED, FUSED]
    x = normal(rng, 6, 2, 4)
    (outputs,) = run(interpreter, x)
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_builtin_model_after_to_scratch(tmp_path, rng):
    builtin = sequential(layers.LSTM(5), layers.Dense(2))
    interpreter = export(to_scratch(builtin), tmp_path / "model.tflite", (1, 7, 3))
    assert operators(interpreter).count(FUSED) == 1
    x = normal(rng, 1, 7, 3)
    expected = builtin.predict(x, verbose=0)
    np.testing.assert_allclose(run(interpreter, x)[0], expected, rtol=0, atol=1e-6)


TRAIN = """
import sys, keras, numpy
from keras_scratch_lstm import ScratchLSTM
layers = [ScratchLSTM(5, return_sequences=True), ScratchLSTM(4, use_bias=False)]
model = keras.Sequential([keras.Input((None, 3)), *layers])
model.compile("sgd", "mse")
rng = numpy.random.default_rng(0)
model.fit(rng.normal(size=(8, 7, 3)), rng.normal(size=(8, 4)), verbose=0)
model.save(sys.argv[1] + "/model.keras")
x = rng.normal(size=(1, 7, 3)).astype("float32")
numpy.savez(sys.argv[1] + "/data.npz", x=x, y=model.predict(x, verbose=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_model_trained_on_another_backend(tmp_path, backend):
    pytest.importorskip(backend)
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", TRAIN, str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    model = keras.saving.load_model(tmp_path / "model.keras")
    interpreter = export(model, tmp_path / "model.tflite", (1, 7, 3))
    assert operators(interpreter).count(FUSED) == 2
    data = np.load(tmp_path / "data.npz")
    (outputs,) = run(interpreter, data["x"])
    np.testing.assert_allclose(outputs, data["y"], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_tensorflow_converter(tmp_path, rng):
    """`TFLiteConverter` needs fixed shapes in the model, or a SavedModel with them."""
    model = keras.Sequential([keras.Input(batch_shape=(1, 7, 3)), ScratchLSTM(5)])
    archive = keras.export.ExportArchive()
    archive.track(model)
    with recurrence.force("litert"):
        archive.add_endpoint("serve", model.call, [tf.TensorSpec((1, 7, 3))])
        archive.write_out(tmp_path / "saved", verbose=False)
    x = normal(rng, 1, 7, 3)
    for converter in (
        tf.lite.TFLiteConverter.from_keras_model(model),
        tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved")),
    ):
        interpreter = load(model_content=converter.convert())
        assert operators(interpreter).count(FUSED) == 1
        expected = model.predict(x, verbose=0)
        np.testing.assert_allclose(run(interpreter, x)[0], expected, rtol=0, atol=1e-6)


def test_export_leaves_training_and_inference_unchanged(tmp_path, rng):
    model = sequential(ScratchLSTM(4), layers.Dense(1))
    model.compile("sgd", "mse")
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.compile("sgd", "mse")
    x, y = normal(rng, 8, 7, 3), normal(rng, 8, 1)
    with pytest.warns(UserWarning, match="keeps its states"):
        export(model, tmp_path / "model.tflite", (1, 7, 3))
    assert model.layers[0].recurrence == "litert"
    for one in (model, twin):
        one.fit(x, y, shuffle=False, verbose=0)
    assert model.layers[0].recurrence == "tensorflow"
    np.testing.assert_array_equal(model.predict(x), twin.predict(x))


def error_of(model, path, shape):
    with pytest.raises(ValueError, match="LiteRT's fused LSTM op requires") as error:
        export(model, path, shape)
    return str(error.value)


INITIAL = keras.Input((3,)), keras.Input((None, 3))
UNSUPPORTED = {
    "custom gates": lambda: sequential(ScratchLSTM(cell=CoupledCell(4), name="own")),
    "other activations": lambda: sequential(ScratchLSTM(4, "relu", name="own")),
    "a mask": lambda: sequential(layers.Masking(), ScratchLSTM(4, name="own")),
    "compute_dtype='float16'": lambda: sequential(
        ScratchLSTM(4, dtype="mixed_float16", name="own")
    ),
    "return_state=True": lambda: keras.Model(
        INITIAL[1], ScratchLSTM(4, return_state=True, name="own")(INITIAL[1])[2]
    ),
    "stateful=True": lambda: keras.Sequential(
        [keras.Input(batch_shape=(1, 7, 3)), ScratchLSTM(4, stateful=True, name="own")]
    ),
    "recurrent dropout": lambda: sequential(
        InTraining(ScratchLSTM(4, recurrent_dropout=0.5, name="own"))
    ),
    "initial states": lambda: keras.Model(
        INITIAL[1],
        ScratchLSTM(3, name="own")(INITIAL[1], initial_state=[INITIAL[1][:, 0]] * 2),
    ),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_error_names_layer_and_reason(tmp_path, reason):
    message = error_of(UNSUPPORTED[reason](), tmp_path / "model.tflite", (1, 7, 3))
    assert "`own` with " in message
    assert reason in message


@pytest.mark.parametrize("shape", [(None, 7, 3), (1, None, 3)])
def test_error_for_unknown_dimensions(tmp_path, shape):
    message = error_of(sequential(ScratchLSTM(4)), tmp_path / "model.tflite", shape)
    assert "unknown dimensions" in message
    assert "`input_signature=" in message


@pytest.mark.slow
def test_loop_on_request(tmp_path, rng):
    model = sequential(layers.Masking(), ScratchLSTM(cell=CoupledCell(4)))
    with recurrence.force("loop"):
        interpreter = export(model, tmp_path / "model.tflite", (1, 7, 3))
    names = operators(interpreter)
    assert "WHILE" in names
    assert FUSED not in names
    x = normal(rng, 1, 7, 3)
    x[:, 2:4] = 0
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run(interpreter, x)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_fused_op_streams_one_time_step_per_invocation(tmp_path, rng):
    """It keeps its states, until they are reset."""
    sequences = {"return_sequences": True}
    model = sequential(ScratchLSTM(5, **sequences), ScratchLSTM(4, **sequences))
    interpreter = export(model, tmp_path / "step.tflite", (1, 1, 3))
    x = normal(rng, 1, 9, 3)
    expected = model.predict(x, verbose=0)
    for _ in range(2):
        interpreter.reset_all_variables()
        steps = np.split(x, 9, axis=1)
        outputs = [run(interpreter, step, reset=False)[0] for step in steps]
        outputs = np.concatenate(outputs, axis=1)
        np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_cell_streams_with_explicit_states(tmp_path, rng):
    model = sequential(ScratchLSTM(5))
    x, h, c = (keras.Input((size,)) for size in (3, 5, 5))
    _, (h_new, c_new) = model.layers[0].cell(x, [h, c])
    step = keras.Model([x, h, c], {"h": h_new, "c": c_new})
    specs = [keras.InputSpec(shape=(1, n), dtype="float32") for n in (3, 5, 5)]
    path = tmp_path / "step.tflite"
    step.export(path, format="litert", input_signature=[specs], verbose=False)
    interpreter = load(model_path=str(path))
    assert FUSED not in operators(interpreter)
    run_step = interpreter.get_signature_runner()  # by name: the order is not kept
    sequence = normal(rng, 1, 9, 3)
    states = {name: np.zeros((1, 5), "float32") for name in ("h", "c")}
    for t in range(9):
        states = run_step(
            args_0=sequence[:, t], args_0_1=states["h"], args_0_2=states["c"]
        )
    expected = model.predict(sequence, verbose=0)
    np.testing.assert_allclose(states["h"], expected, rtol=0, atol=1e-6)


def int8(samples):
    """Options of full integer quantization."""
    return {
        "optimizations": [tf.lite.Optimize.DEFAULT],
        "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
        "representative_dataset": lambda: ([x] for x in samples),
    }


@pytest.mark.parametrize(
    ("quantization", "bound"),
    [
        pytest.param("float16", 1e-3, marks=pytest.mark.slow),
        pytest.param("dynamic range", 0.02, marks=pytest.mark.slow),
        ("int8", 0.05),
    ],
)
def test_quantized_outputs(tmp_path, rng, quantization, bound):
    """Largest difference from float32; outputs are between -1 and 1."""
    samples = normal(rng, 100, 1, 12, 8)
    options = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    if quantization == "dynamic range":  # the new quantizer leaves the op in float32
        options["experimental_new_dynamic_range_quantizer"] = False
    if quantization == "float16":
        options["target_spec"] = {"supported_types": [tf.float16]}
    if quantization == "int8":
        options = int8(samples)
    model = sequential(ScratchLSTM(64, return_sequences=True), shape=(12, 8))
    path, float32 = tmp_path / "model.tflite", tmp_path / "float32.tflite"
    interpreter = export(model, path, (1, 12, 8), **options)
    assert operators(interpreter).count(FUSED) == 1
    exact = export(model, float32, (1, 12, 8))
    largest = max(
        np.abs(run(interpreter, x)[0] - run(exact, x)[0]).max() for x in samples[:20]
    )
    assert 0 < largest < bound
    assert path.stat().st_size < 0.7 * float32.stat().st_size


def error_before_and_after_remove_limits(model, path, x, **options):
    from keras_scratch_lstm.recurrence.litert import remove_limits

    expected, errors = model.predict(x, verbose=0), []
    interpreter = export(model, path, x.shape, **options)
    errors.append(np.abs(run(interpreter, x)[0] - expected).max())
    remove_limits(path)
    interpreter = load(model_path=str(path))
    errors.append(np.abs(run(interpreter, x)[0] - expected).max())
    return errors


def test_cell_states_above_10(tmp_path):
    """The cell state counts to 15, then down to 1. The converter clips it at 10."""
    model = sequential(ScratchLSTM(2, unit_forget_bias=False), shape=(29, 1))
    cell = model.layers[0].cell
    model.set_weights([np.zeros(weight.shape) for weight in model.get_weights()])
    for bias in (cell.b_i, cell.b_f, cell.b_o):
        bias.assign([30.0, 30.0])
    cell.W_xc.assign([[30.0, -30.0]])
    x = np.ones((1, 29, 1), "float32")
    x[:, 15:] = -1
    path = tmp_path / "model.tflite"
    before, after = error_before_and_after_remove_limits(model, path, x)
    assert before > 1
    assert after < 1e-6


@pytest.mark.slow
def test_int8_cell_states_below_a_half(tmp_path, rng):
    """The kernel has no `tanh` for the range that the converter chooses."""
    model = sequential(ScratchLSTM(16), shape=(12, 8))
    model.set_weights([weight / 4 for weight in model.get_weights()])
    samples = normal(rng, 100, 1, 12, 8)
    before, after = error_before_and_after_remove_limits(
        model, tmp_path / "model.tflite", samples[0], **int8(samples)
    )
    assert before > 0.05
    assert after < 0.02
