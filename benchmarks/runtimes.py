"""Run exported models in every runtime: the table of `docs/deployment.md`.

    python benchmarks/runtimes.py --out benchmarks/results

Each runtime has processes of its own, one for `ScratchLSTM` and one for `LSTM`. A cell
of the table is the largest difference from the Keras model, or what went wrong.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

BATCH, TIME, FEATURES, UNITS = 2, 6, 3, 8
CALLS = 2
KINDS = ("plain", "stacked", "bidirectional", "masked", "stateful")
LAYERS = ("ScratchLSTM", "LSTM")
PACKAGES = (
    *("keras", "tensorflow", "jax", "torch", "ai-edge-litert", "tflite_micro"),
    *("onnxruntime", "openvino", "coremltools"),
)
TIMEOUT = 900  # seconds for the five models of one layer
TOLERANCE = 1e-3

LOAD_SAVED_MODEL = """
import sys, numpy as np, tensorflow as tf
served = tf.saved_model.load(sys.argv[1] + "/saved")
for x in np.load(sys.argv[1] + "/x.npy"):
    outputs = served.serve(x)
assert "keras_scratch_lstm" not in sys.modules
np.save(sys.argv[1] + "/y.npy", outputs)
"""


def build(kind, layer):
    """A model, and its inputs of two consecutive calls."""
    import keras
    from keras import layers

    import keras_scratch_lstm

    keras.utils.set_random_seed(0)
    lstm = layers.LSTM if layer == "LSTM" else keras_scratch_lstm.ScratchLSTM
    parts = {
        "plain": lambda: [lstm(UNITS)],
        "stacked": lambda: [lstm(UNITS, return_sequences=True), lstm(UNITS)],
        "bidirectional": lambda: [layers.Bidirectional(lstm(UNITS))],
        "masked": lambda: [layers.Masking(), lstm(UNITS)],
        "stateful": lambda: [lstm(UNITS, stateful=True)],
    }[kind]()
    inputs = keras.Input(batch_shape=(BATCH, TIME, FEATURES))
    model = keras.Sequential([inputs, *parts, layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(CALLS, BATCH, TIME, FEATURES))
    if kind == "masked":
        x[:, 0, 4:] = 0
    return model, x.astype("float32")


# --- one function per runtime: exports a model, and returns a function that runs it ---


def signature():
    import keras

    return [keras.InputSpec(shape=(BATCH, TIME, FEATURES), dtype="float32")]


def write_litert(model, folder, layer):
    path = str(folder / "model.tflite")
    if layer == "ScratchLSTM":
        from keras_scratch_lstm import export_litert

        shape = BATCH, TIME, FEATURES
        export_litert(model, path, input_shape=shape, verbose=False)
    else:
        options = {"input_signature": signature(), "verbose": False}
        model.export(path, format="litert", **options)
    return path


def litert(model, folder, layer):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(write_litert(model, folder, layer))
    interpreter.allocate_tensors()
    (inputs,), (outputs,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )

    def run(x):
        if layer == "ScratchLSTM":  # the fused op keeps its states
            interpreter.reset_all_variables()
        interpreter.set_tensor(inputs["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(outputs["index"])

    return run


def litert_micro(model, folder, layer):
    import tflite_micro

    path = write_litert(model, folder, layer)
    interpreter = tflite_micro.runtime.Interpreter.from_file(path)

    def run(x):
        if layer == "ScratchLSTM":
            interpreter.reset()
        interpreter.set_input(x, 0)
        interpreter.invoke()
        return interpreter.get_output(0)

    return run


def write_onnx(model, folder):
    path = str(folder / "model.onnx")
    model.export(path, format="onnx", input_signature=signature(), verbose=False)
    return path


def onnx_runtime(model, folder, layer):
    import onnxruntime

    session = onnxruntime.InferenceSession(write_onnx(model, folder))
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def in_openvino(path):
    import openvino

    compiled = openvino.compile_model(openvino.convert_model(path), "CPU")
    return lambda x: compiled(x)[0]


def openvino_onnx(model, folder, layer):
    return in_openvino(write_onnx(model, folder))


def write_saved_model(model, folder):
    path, options = str(folder / "saved"), {"input_signature": signature()}
    model.export(path, format="tf_saved_model", verbose=False, **options)
    return path


def openvino_saved_model(model, folder, layer):
    return in_openvino(write_saved_model(model, folder))


def saved_model(model, folder, layer):
    write_saved_model(model, folder)
    inputs = []

    def run(x):
        inputs.append(x)
        if len(inputs) < CALLS:
            return None  # one process makes all calls
        np.save(folder / "x.npy", inputs)
        command = [sys.executable, "-c", LOAD_SAVED_MODEL, str(folder)]
        subprocess.run(command, check=True)
        return np.load(folder / "y.npy")

    return run


def exported_by_torch(model):
    import torch

    return torch.export.export(model.eval(), (torch.zeros(BATCH, TIME, FEATURES),))


def on_torch(program):
    import torch

    return lambda x: program(torch.tensor(x)).detach().numpy()


def torch_export(model, folder, layer):
    import torch

    path = folder / "model.pt2"
    torch.export.save(exported_by_torch(model), path)
    return on_torch(torch.export.load(path).module())


def aot_inductor(model, folder, layer):
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    path = str(folder / "model.pt2")
    aoti_compile_and_package(exported_by_torch(model), package_path=path)
    return on_torch(aoti_load_package(path))


def jax_export(model, folder, layer):
    import jax
    from jax import export

    trainable, others = (
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )

    @jax.jit
    def predict(x):
        return model.stateless_call(trainable, others, x)[0]

    shape = jax.ShapeDtypeStruct((BATCH, TIME, FEATURES), "float32")
    (path := folder / "model.jax").write_bytes(
        export.export(predict)(shape).serialize()
    )
    return export.deserialize(bytearray(path.read_bytes())).call


def core_ml(model, folder, layer):
    import coremltools
    import torch

    inputs = torch.zeros(BATCH, TIME, FEATURES)
    traced = torch.jit.trace(model.eval(), inputs, check_trace=False)
    shape = coremltools.TensorType(shape=inputs.shape)
    # Core ML predicts on macOS only, so there is nothing to run.
    coremltools.convert(traced, inputs=[shape], convert_to="mlprogram")


RUNTIMES = {
    "LiteRT": ("tensorflow", litert),
    "LiteRT Micro": ("tensorflow", litert_micro),
    "ONNX Runtime, from PyTorch": ("torch", onnx_runtime),
    "ONNX Runtime, from TensorFlow": ("tensorflow", onnx_runtime),
    "OpenVINO, ONNX from PyTorch": ("torch", openvino_onnx),
    "OpenVINO, ONNX from TensorFlow": ("tensorflow", openvino_onnx),
    "OpenVINO, SavedModel": ("tensorflow", openvino_saved_model),
    "SavedModel, from TensorFlow": ("tensorflow", saved_model),
    "SavedModel, from JAX": ("jax", saved_model),
    "`torch.export`": ("torch", torch_export),
    "AOTInductor": ("torch", aot_inductor),
    "`jax.export`": ("jax", jax_export),
    "Core ML (conversion only)": ("torch", core_ml),
}


def outcome(runtime, kind, layer):
    """The largest difference, or `"converted"`, `"wrong"` or the error."""
    import keras

    model, calls = build(kind, layer)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = RUNTIMES[runtime][1](model, Path(folder), layer)
            if run is None:
                return "converted"
            found = [run(x) for x in calls][-1]
        except Exception as error:  # the runtimes have no common base class
            return f"error: {str(error).strip() or type(error).__name__}"[:200]
    if kind == "stateful":
        model.layers[0].reset_state()
    expected = [keras.ops.convert_to_numpy(model(x)) for x in calls][-1]
    difference = float(np.abs(np.asarray(found) - expected).max())
    return difference if difference < TOLERANCE else "wrong"


def work(runtime, layer):
    """Prints a line of JSON for each model; what else is printed goes to stderr."""
    results, printed = os.dup(1), sys.stderr.fileno()
    os.dup2(printed, 1)
    for kind in KINDS:
        line = json.dumps([kind, outcome(runtime, kind, layer)]) + "\n"
        os.write(results, line.encode())


def measure(runtime, layer):
    """The outcome of each model. A process that crashes or hangs leaves some out."""
    environment = os.environ | {
        "KERAS_BACKEND": RUNTIMES[runtime][0],
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    command = [sys.executable, __file__, "--worker", runtime, layer]
    log = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, env=environment
    ) as process:
        try:
            lines, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            lines, _ = process.communicate()
    return dict(map(json.loads, lines.splitlines()))


def table(results):
    rows = [["runtime", *KINDS]]
    for runtime, of_layer in results.items():
        cells = [
            " / ".join(text(of_layer[layer].get(kind, "crash")) for layer in LAYERS)
            for kind in KINDS
        ]
        rows.append([runtime, *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def text(value):
    return f"{value:.0e}" if isinstance(value, float) else value.partition(":")[0]


def versions():
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=RUNTIMES, nargs="+", default=list(RUNTIMES))
    parser.add_argument("--out", type=Path, help="folder for runtimes.json and .md")
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return
    record = args.out and args.out / "runtimes.json"
    results = json.loads(record.read_text()) if record and record.exists() else {}
    for runtime in args.only:
        results[runtime] = {layer: measure(runtime, layer) for layer in LAYERS}
        print(runtime, json.dumps(results[runtime]), flush=True)
        if record:
            record.write_text(json.dumps(results, indent=1) + "\n")
    results = {name: results[name] for name in RUNTIMES if name in results}
    page = f"{table(results)}\n\n{', '.join(versions())}; {datetime.date.today()}\n"
    print(page)
    if args.out:
        (args.out / "runtimes.md").write_text(page)


if __name__ == "__main__":
    main()
