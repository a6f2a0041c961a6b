"""The table of exported layers in `docs/deployment.md`, each cell from real files."""

from functools import partial
from pathlib import Path

import keras
import numpy as np
import pytest
from custom_cells import CoupledCell
from keras import layers

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, export_litert, to_builtin

BACKEND = keras.backend.backend()
PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"
FEATURES, UNITS, BATCH, TIME = 3, 4, 2, 6
FREE_SHAPES = (1, 1), (BATCH, TIME), (5, 9)

pytestmark = [
    # Keras exports to ONNX on torch with the older exporter.
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based"),
    pytest.mark.filterwarnings("ignore:.*might cause the trace to be incorrect"),
    pytest.mark.filterwarnings("ignore:torch.* results are registered as constants"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size"),
    pytest.mark.filterwarnings("ignore:The `native_serialization`:DeprecationWarning"),
]


FUSED = (
    "default, `return_sequences`, stacked, `Bidirectional`, `go_backwards`, "
    "`use_bias=False`"
)


def plain(layer, **kwargs):
    return lambda x: layer(UNITS, **kwargs)(x)


def fused(layer):
    both = layers.Bidirectional(layer(UNITS, return_sequences=True))
    return lambda x: layer(UNITS, go_backwards=True, use_bias=False)(both(x))


def masked(layer):
    return lambda x: layer(UNITS, activation="relu")(layers.Masking()(x))


def with_states(layer):
    def call(x):
        states = [layers.Dense(UNITS)(x[:, 0]) for _ in range(2)]
        outputs = layer(UNITS, return_state=True)(x, initial_state=states)
        return layers.concatenate(outputs)

    return call


def around_cell(layer):
    cell = ScratchLSTMCell if layer is ScratchLSTM else layers.LSTMCell
    return layers.RNN(cell(UNITS))


ROWS = {  # a row of several kinds has one model of all of them
    FUSED: fused,
    "`time_major`": partial(plain, time_major=True, return_sequences=True),
    "other activations, mask": masked,
    "custom gates": lambda layer: layer(cell=CoupledCell(UNITS)),
    "`initial_state`, `return_state`": with_states,
    "`stateful`": partial(plain, stateful=True),
    "`unroll`": partial(plain, unroll=True),
    "`RNN` of a cell": around_cell,
}
FIXED = ("`stateful`", "`unroll`")
ONLY_SCRATCH = ("`time_major`", "custom gates")
# For the others, see `test_saving.py`.
IN_SAVED_MODEL = ("other activations, mask", "`initial_state`, `return_state`", *FIXED)
IN_SAVED_MODEL += ("`time_major`", "`RNN` of a cell")


def build(row, layer, fixed=False):
    """A model of one row, with free batch and time where it allows them."""
    fixed = fixed or row in FIXED
    shape = (BATCH, TIME) if fixed else (None, None)
    inputs = keras.Input(batch_shape=(*shape, FEATURES))
    model = keras.Model(inputs, ROWS[row](layer)(inputs))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.5, w.shape) for w in model.get_weights()])
    return model


def is_equal(model, run, shape):
    x = np.random.default_rng(1).normal(size=shape).astype("float32")
    reset(model)
    expected = keras.ops.convert_to_numpy(model(x))
    return np.shape(got := run(x)) == expected.shape and np.allclose(
        got, expected, rtol=0, atol=1e-6
    )


def reset(model):
    for layer in model.layers:
        if getattr(layer, "stateful", False):
            layer.reset_state()


def in_litert(row, folder):
    """What `export_litert` writes."""
    model = build(row, ScratchLSTM)
    reset(model)
    path, shape = folder / "model.tflite", (BATCH, TIME, FEATURES)
    try:
        export_litert(model, path, input_shape=shape, verbose=False)
    except ValueError as error:
        if "LiteRT's fused LSTM op requires" not in str(error):
            raise
        return "error"
    return litert_ops(model, path)


def in_litert_of_keras(row, folder):
    """What `model.export` writes."""
    model = build(row, ScratchLSTM)
    reset(model)
    path, shape = str(folder / "model.tflite"), (BATCH, TIME, FEATURES)
    signature = [keras.InputSpec(shape=shape, dtype="float32")]
    model.export(path, format="litert", input_signature=signature, verbose=False)
    return litert_ops(model, path)


def litert_ops(model, path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()

    def run(x):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    assert is_equal(model, run, (BATCH, TIME, FEATURES))
    names = [op["op_name"] for op in interpreter._get_ops_details()]
    if "UNIDIRECTIONAL_SEQUENCE_LSTM" in names:
        return "fused"
    return "loop" if "WHILE" in names else "unrolled"


def in_onnx(row, layer, folder):
    if row not in FIXED:
        model = build(row, layer)
        run = run_onnx(model, folder / "model.onnx")
        shapes = [(*shape, FEATURES) for shape in FREE_SHAPES]
        if run and all(is_equal(model, run, shape) for shape in shapes):
            return "any length"
    model = build(row, layer, fixed=True)
    run = run_onnx(model, folder / "model.onnx", (BATCH, TIME, FEATURES))
    return "fixed length" if is_equal(model, run, (BATCH, TIME, FEATURES)) else "wrong"


def run_onnx(model, path, shape=None):
    """A function that runs the exported model, or `None` if Keras rejects it."""
    import onnxruntime

    signature = shape and [keras.InputSpec(shape=shape, dtype="float32")]
    model(np.zeros((BATCH, TIME, FEATURES), "float32"))  # Keras requires a call
    reset(model)
    try:
        model.export(path, format="onnx", input_signature=signature, verbose=False)
    except ValueError as error:
        if "dynamic time dimension" not in str(error):  # Keras 3.16
            raise
        return None
    session = onnxruntime.InferenceSession(str(path))

    def run(x):
        try:
            return session.run(None, {session.get_inputs()[0].name: x})[0]
        except Exception:  # depends on the op; they have no public base class
            return None

    return run


def in_saved_model(row, folder):
    import tensorflow as tf

    model = build(row, ScratchLSTM)
    reset(model)
    model.export(folder / "saved", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(str(folder / "saved"))
    return is_equal(model, loaded.serve, (BATCH, TIME, FEATURES))


@pytest.mark.skipif(BACKEND != "torch", reason="ONNX as PyTorch exports it")
def test_onnx_has_one_op_per_layer_and_direction(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run = run_onnx(model := build(FUSED, ScratchLSTM), path := tmp_path / "model.onnx")
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert ops.count("LSTM") == 3
    assert not {"Loop", "Scan"} & {*ops}
    assert all(is_equal(model, run, (*shape, FEATURES)) for shape in FREE_SHAPES)


@pytest.mark.skipif(BACKEND != "torch", reason="Core ML converts models of PyTorch")
@pytest.mark.filterwarnings("default")  # those of Core ML's converter
def test_core_ml_converts():
    """One LSTM op per layer and direction. Running it needs macOS."""
    coremltools = pytest.importorskip("coremltools")
    import torch

    both = layers.Bidirectional(ScratchLSTM(UNITS, return_sequences=True))
    inputs = keras.Input(batch_shape=(shape := (BATCH, TIME, FEATURES)))
    model = keras.Model(inputs, ScratchLSTM(UNITS)(both(inputs))).eval()
    traced = torch.jit.trace(model, torch.zeros(shape), check_trace=False)
    inputs = [coremltools.TensorType(shape=shape)]
    program = coremltools.convert(traced, inputs=inputs, convert_to="milinternal")
    assert len(program.functions["main"].find_ops(op_type="lstm")) == 3


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="ONNX as TensorFlow exports it")
@pytest.mark.filterwarnings("default")  # those of tf2onnx
@pytest.mark.parametrize(
    ("convert", "op"), [(to_builtin, "LSTM"), (lambda model: model, "Loop")]
)
def test_onnx_on_tensorflow(tmp_path, convert, op):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    inputs = keras.Input((None, FEATURES))
    h = ScratchLSTM(UNITS, return_sequences=True)(inputs)
    model = convert(keras.Model(inputs, ScratchLSTM(UNITS)(h)))
    run = run_onnx(model, path := str(tmp_path / "model.onnx"))
    assert [node.op_type for node in onnx.load(path).graph.node].count(op) == 2
    assert all(is_equal(model, run, (*shape, FEATURES)) for shape in FREE_SHAPES)


def documented():
    """The cells of the page's table: `{row: [LiteRT, LiteRT, ONNX, ONNX]}`."""
    table = PAGE.read_text().split("<!-- exports -->")[1].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row: rest for row, *rest in cells}


@pytest.mark.one_backend
def test_table_has_every_layer():
    assert list(documented()) == list(ROWS)


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("row", ROWS)
def test_litert_and_saved_model(tmp_path, row):
    if BACKEND != "tensorflow":
        pytest.skip("formats of TensorFlow")
    pytest.importorskip("ai_edge_litert")
    found = [in_litert(row, tmp_path), in_litert_of_keras(row, tmp_path)]
    assert found == documented()[row][:2]
    if row in IN_SAVED_MODEL:
        assert in_saved_model(row, tmp_path)


@pytest.mark.skipif(BACKEND != "torch", reason="the way to ONNX")
@pytest.mark.parametrize("row", ROWS)
def test_onnx(tmp_path, row):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = [in_onnx(row, ScratchLSTM, tmp_path)]
    builtin = row not in ONLY_SCRATCH
    found.append(in_onnx(row, layers.LSTM, tmp_path) if builtin else "–")
    assert found == documented()[row][2:]
