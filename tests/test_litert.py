"""Files of `export_litert` in LiteRT: operators, outputs, states, quantization."""

import keras
import numpy as np
import pytest
from custom_cells import CoupledCell
from keras import layers

from keras_scratch_lstm import ScratchLSTM, export_litert

if keras.backend.backend() != "tensorflow":
    pytest.skip("the converter is part of TensorFlow", allow_module_level=True)
Interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]
FUSED = "UNIDIRECTIONAL_SEQUENCE_LSTM"


class InTraining(layers.Wrapper):
    def call(self, x):
        return self.layer(x, training=True)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.lstm = ScratchLSTM(4)

    def call(self, x):
        return self.lstm(x)


def export(model, path, shape=None, **kwargs):
    """The interpreter of an exported model."""
    export_litert(model, path, input_shape=shape, verbose=False, **kwargs)
    interpreter = Interpreter(str(path))
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


def both_directions():
    """See also `test_export_table.py`."""
    both = layers.Bidirectional(layers.LSTM(5, return_sequences=True))
    return sequential(both, ScratchLSTM(4, go_backwards=True, use_bias=False))


def shared_and_time_major():
    shared = ScratchLSTM(4, return_sequences=True, time_major=True)
    inputs = keras.Input(batch_shape=(6, 2, 4))
    return keras.Model(inputs, shared(shared(inputs)))


@pytest.mark.parametrize(
    ("make", "shape", "count"),
    [
        (both_directions, (2, 7, 3), 3),
        (shared_and_time_major, (6, 2, 4), 2),
        (Subclassed, (1, 7, 3), 1),
    ],
)
def test_each_direction_is_one_fused_op(tmp_path, rng, make, shape, count):
    model = make()
    model(np.zeros(shape, "float32"))
    randomize(model, rng)
    interpreter = export(model, tmp_path / "model.tflite", shape)
    names = operators(interpreter)
    assert names.count(FUSED) == count
    assert not {name for name in names if "WHILE" in name or "Flex" in name}
    for _ in range(3):
        x = normal(rng, *shape)
        (outputs,) = run(interpreter, x)
        np.testing.assert_allclose(outputs, model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_inputs_and_outputs_keep_their_order(tmp_path, rng, quantize):
    """The converter reorders them. In int8, joins with another scale were wrong."""
    a, b = keras.Input((6, 3), name="z"), keras.Input((2,), name="a")
    h = layers.LSTM(4)(a)
    outputs = [layers.Dense(3)(layers.concatenate([h, b])), h, 3 * b]
    model = keras.Model({"z": a, "a": b}, outputs)
    data = {"z": normal(rng, 50, 6, 3), "a": 4 * normal(rng, 50, 2)}
    path, options = tmp_path / "model.tflite", {"representative_data": data}
    interpreter = export(model, path, quantize=quantize, **options)
    quantum = np.ptp(data["a"]) / 255 if quantize else 1e-6
    for k in range(20):
        inputs = {name: array[k : k + 1] for name, array in data.items()}
        found = run(interpreter, inputs["a"], inputs["z"])
        expected = model.predict(inputs, verbose=0)
        bounds = [8 * quantum, 2 * quantum, 4 * quantum]
        for value, want, bound in zip(found, expected, bounds, strict=True):
            np.testing.assert_allclose(value, want, rtol=0, atol=bound)


def test_export_leaves_training_and_inference_unchanged(tmp_path, rng):
    model = sequential(ScratchLSTM(4), layers.Dense(1))
    model.compile("sgd", "mse")
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    twin.compile("sgd", "mse")
    x, y = normal(rng, 8, 7, 3), normal(rng, 8, 1)
    export(model, tmp_path / "model.tflite", (1, 7, 3))
    for one in (model, twin):
        one.fit(x, y, shuffle=False, verbose=0)
    assert model.layers[0].recurrence == "tensorflow"
    np.testing.assert_array_equal(model.predict(x), twin.predict(x))


def test_summary(tmp_path, rng, capsys):
    model = sequential(ScratchLSTM(5), layers.Dense(2), shape=(7, 3))
    file = export_litert(model, path := tmp_path / "model.tflite")
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    assert file.path == path
    assert file.size == path.stat().st_size
    assert list(file.operators) == sorted(set(operators(interpreter)))
    assert file.largest_difference < 1e-6
    assert "AddUnidirectionalSequenceLSTM()" in file.micro
    printed = capsys.readouterr().out
    assert str(file) in printed
    assert all(name in str(file) for name in (*file.operators, *file.micro, str(path)))


INITIAL = keras.Input((3,)), keras.Input((None, 3))
UNSUPPORTED = {
    "custom gates": lambda: sequential(ScratchLSTM(cell=CoupledCell(4), name="own")),
    "other activations": lambda: sequential(layers.LSTM(4, "relu", name="own")),
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
    with pytest.raises(ValueError, match="`own` with ") as error:
        export(UNSUPPORTED[reason](), tmp_path / "model.tflite", (1, 7, 3))
    assert reason in str(error.value)
    assert not (tmp_path / "model.tflite").exists()


INVALID = {
    "`model` must": {"model": keras.Sequential([ScratchLSTM(4)])},
    "`quantize` must": {"quantize": "int4"},
    "`io_dtype` must": {"io_dtype": "int8"},
    "`representative_data` must be an array": {"quantize": "int8"},
    "Received: input_shape=None": {},
    r"Received: input_shape=\(None, 7, 3\)": {"input_shape": (None, 7, 3)},
    "must have no loop": {
        "model": sequential(layers.GRU(2)),
        "quantize": "int8",
        "representative_data": np.ones((5, 7, 3)),
    },
}


@pytest.mark.parametrize("message", INVALID)
def test_error_for_invalid_arguments(tmp_path, message):
    arguments = {"model": sequential(ScratchLSTM(4)), "path": tmp_path / "model.tflite"}
    with pytest.raises(ValueError, match=message):
        export_litert(**{**arguments, **INVALID[message]})


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
    step = keras.Model([x, h, c], model.layers[0].cell(x, [h, c])[1])
    interpreter = export(step, tmp_path / "step.tflite")
    assert FUSED not in operators(interpreter)
    sequence = normal(rng, 1, 9, 3)
    states = [np.zeros((1, 5), "float32")] * 2
    for t in range(9):
        states = run(interpreter, sequence[:, t], *states)
    expected = model.predict(sequence, verbose=0)
    np.testing.assert_allclose(states[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("quantize", "bound"),
    [
        pytest.param("float16", 1e-3, marks=pytest.mark.slow),
        pytest.param("dynamic", 0.02, marks=pytest.mark.slow),
        ("int8", 0.05),
    ],
)
def test_quantized_outputs(tmp_path, rng, quantize, bound):
    """Largest difference from the model; outputs are between -1 and 1."""
    samples = normal(rng, 100, 12, 16)
    model = sequential(ScratchLSTM(64, return_sequences=True), shape=(12, 16))
    path, options = tmp_path / "model.tflite", {"representative_data": samples}
    interpreter = export(model, path, quantize=quantize, **options)
    assert operators(interpreter).count(FUSED) == 1
    expected = model.predict(samples, verbose=0)
    found = np.concatenate([run(interpreter, x[None])[0] for x in samples])
    assert 0 < np.abs(found - expected).max() < bound
    assert path.stat().st_size < 0.7 * 4 * model.count_params()


@pytest.mark.slow
def test_int8_inputs_and_outputs(tmp_path, rng):
    samples = normal(rng, 100, 12, 8)
    model = sequential(layers.Bidirectional(ScratchLSTM(8)), shape=(12, 8))
    path, options = tmp_path / "model.tflite", {"representative_data": samples}
    interpreter = export(model, path, quantize="int8", io_dtype="int8", **options)
    (inputs,), (outputs,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    assert inputs["dtype"] == outputs["dtype"] == np.int8
    scale, zero = inputs["quantization"]
    x = np.clip(np.round(samples[:1] / scale) + zero, -128, 127).astype("int8")
    scale, zero = outputs["quantization"]
    found = (run(interpreter, x)[0].astype("float32") - zero) * scale
    expected = model.predict(samples[:1], verbose=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.05)


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
    interpreter = export(model, tmp_path / "model.tflite")
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(run(interpreter, x)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_int8_cell_states_below_a_half(tmp_path, rng):
    """The kernel has no `tanh` for the range that the converter chooses."""
    model = sequential(ScratchLSTM(16), shape=(12, 8))
    model.set_weights([weight / 4 for weight in model.get_weights()])
    samples = normal(rng, 100, 12, 8)
    path, options = tmp_path / "model.tflite", {"representative_data": samples}
    interpreter = export(model, path, quantize="int8", **options)
    expected = model.predict(samples[:1], verbose=0)
    found = run(interpreter, samples[:1])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)
