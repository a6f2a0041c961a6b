"""Train a classifier of sensor signals, and deploy it to microcontrollers and servers.

python examples/deploy.py    # needs TensorFlow, PyTorch and the extra `export`

Writes LiteRT files in four number formats, and one for ONNX Runtime. For a firmware:
`model_data.cc` and `model_data.h`, the int8 file as an array, and `ops.txt`, the
operators to register.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("deploy.py", __doc__)
    epochs = {"type": common.positive_integer, "default": 15}
    parser.add_argument("--epochs", **epochs, help="passes over 4,096 signals")
    out = {"type": Path, "default": Path("runs/deploy")}
    parser.add_argument("--out", **out, help="output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    common.load_keras()

import keras
import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter

from keras_scratch_lstm import ScratchLSTM, export_litert

FORMATS = {"float32": None, "float16": "float16", "dynamic": "dynamic", "int8": "int8"}
ON_TORCH = """
import sys, keras, keras_scratch_lstm
(model := keras.saving.load_model(sys.argv[1]))(keras.ops.zeros((1, 1, 3)))
model.export(sys.argv[2], format="onnx", verbose=False)
"""
HEADER = """#pragma once
extern const unsigned char model_data[];
extern const unsigned int model_data_size;
"""


def signals(count, rng, steps=48):
    """Returns noisy sines, squares, sawtooths and chirps on three axes, and labels."""
    labels = rng.integers(0, 4, count)
    t = np.arange(steps) * rng.uniform(0.05, 0.1, (count, 1)) + rng.random((count, 1))
    waves = [np.sin(2 * np.pi * t), np.sign(np.sin(2 * np.pi * t)), 2 * (t % 1) - 1]
    waves = np.stack([*waves, np.sin(t**2 * np.pi / 2)])[labels, np.arange(count)]
    x = waves[:, :, None] * rng.uniform(-1, 1, (count, 1, 3))
    return (x + rng.normal(0, 0.05, x.shape)).astype("float32"), labels


def train(epochs):
    keras.utils.set_random_seed(0)
    classify = keras.layers.Dense(4, "softmax")
    model = keras.Sequential([keras.Input((None, 3)), ScratchLSTM(64), classify])
    model.compile(keras.optimizers.Adam(0.005), "sparse_categorical_crossentropy")
    x, labels = signals(4096, np.random.default_rng(0))
    model.fit(x, labels, batch_size=64, epochs=epochs, verbose=0)
    return model


def run_litert(path):
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    invoke = interpreter.get_signature_runner()

    def run(sequence):
        interpreter.reset_all_variables()  # the op keeps its states
        return invoke(input_0=sequence)["output_0"]

    return run


def write_firmware(file, folder):
    """Writes the file as a C++ array, and the operators to register."""
    content = file.path.read_bytes()
    rows = [content[k : k + 16] for k in range(0, len(content), 16)]
    rows = [" ".join(f"0x{byte:02x}," for byte in row) for row in rows]
    source = ['#include "model_data.h"', "alignas(16) extern const unsigned char"]
    source += ["model_data[] = {", *rows, "};"]
    source += [f"extern const unsigned int model_data_size = {len(content)};", ""]
    (folder / "model_data.cc").write_text("\n".join(source))
    (folder / "model_data.h").write_text(HEADER)
    count = f"MicroMutableOpResolver<{len(file.micro)}> resolver;"
    calls = [f"resolver.{call};" for call in file.micro]
    (folder / "ops.txt").write_text("\n".join([count, *calls, ""]))


def run_onnx(model, path):
    model.save(saved := path.with_suffix(".keras"))
    command, torch = [sys.executable, "-c", ON_TORCH], {"KERAS_BACKEND": "torch"}
    subprocess.run([*command, saved, path], check=True, env=os.environ | torch)
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda sequence: session.run(None, {name: sequence})[0]


def main(argv=None):
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model, runners, rng = train(args.epochs), {}, np.random.default_rng(1)
    (samples, _), (x, labels) = signals(200, rng), signals(500, rng)
    for name, quantize in FORMATS.items():
        path, options = args.out / f"{name}.tflite", {"quantize": quantize}
        file = export_litert(model, path, representative_data=samples, **options)
        runners[path] = run_litert(path)
    write_firmware(file, args.out)  # the last one, in int8
    runners[path] = run_onnx(model, path := args.out / "model.onnx")
    expected = model.predict(x, verbose=0)
    for path, run in runners.items():
        start = time.perf_counter()
        y = np.concatenate([run(sequence[None]) for sequence in x])
        latency = (time.perf_counter() - start) / len(x) * 1e6
        size, accuracy = path.stat().st_size / 1000, np.mean(y.argmax(1) == labels)
        print(f"{path.name:>14}: {size:.1f} kB, {latency:.0f} µs, largest ", end="")
        print(f"difference {np.abs(y - expected).max():.1e}, accuracy {accuracy:.1%}")


if __name__ == "__main__":
    sys.exit(main())
