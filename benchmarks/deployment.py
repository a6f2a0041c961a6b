"""Compare size and latency of an LSTM's LiteRT files.

    python benchmarks/deployment.py --out benchmarks/results

Batch size 1, 20 time steps, 8 features, one thread. The files take turns, so each ratio
is one of medians of the same run.
"""

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

from keras_scratch_lstm import recurrence, to_scratch

SHAPE = (1, 20, 8)


def export(model, path, **options):
    options["input_signature"] = [keras.InputSpec(shape=SHAPE, dtype="float32")]
    with recurrence.force("litert"):
        model.export(path, format="litert", verbose=False, **options)
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    return interpreter


def run(interpreter, x):
    interpreter.reset_all_variables()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    start = time.perf_counter()
    interpreter.invoke()
    seconds = time.perf_counter() - start
    output = interpreter.get_output_details()[0]["index"]
    return interpreter.get_tensor(output), seconds


def measure(units, samples, folder):
    """The results of each form of one layer: kB, microseconds, largest difference."""
    keras.utils.set_random_seed(0)
    loop, unrolled = (
        keras.Sequential([keras.Input(SHAPE[1:]), keras.layers.LSTM(units, unroll=u)])
        for u in (False, True)
    )
    unrolled.set_weights(loop.get_weights())
    scratch = to_scratch(loop)
    int8 = {
        "optimizations": [tf.lite.Optimize.DEFAULT],
        "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
        "representative_dataset": lambda: ([x] for x in samples),
    }
    forms = {
        "`LSTM`, loop": (loop, {}),
        "`LSTM`, `unroll=True`": (unrolled, {}),
        "`ScratchLSTM`": (scratch, {}),
        "`ScratchLSTM`, int8": (scratch, int8),
    }
    files = {name: folder / f"{k}.tflite" for k, name in enumerate(forms)}
    runners = {
        name: export(model, files[name], **options)
        for name, (model, options) in forms.items()
    }
    seconds, difference = {name: [] for name in forms}, dict.fromkeys(forms, 0.0)
    for x in samples:
        expected = loop(x).numpy()
        for name, interpreter in runners.items():
            output, elapsed = run(interpreter, x)
            seconds[name].append(elapsed)
            largest = float(np.abs(output - expected).max())
            difference[name] = max(difference[name], largest)
    return {
        name: {
            "kB": files[name].stat().st_size / 1000,
            "microseconds": float(np.median(seconds[name])) * 1e6,
            "difference": difference[name],
        }
        for name in forms
    }


def table(results):
    lines = [
        "| units | layer | file, kB | µs (median) | / loop | / unrolled | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for units, forms in results.items():
        loop, unrolled = (form["microseconds"] for form in list(forms.values())[:2])
        for name, form in forms.items():
            lines.append(
                f"| {units} | {name} | {form['kB']:.1f} | {form['microseconds']:.0f} | "
                f"{form['microseconds'] / loop:.2f} | "
                f"{form['microseconds'] / unrolled:.2f} | {form['difference']:.0e} |"
            )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--out", type=Path, help="folder for deployment.json and .md")
    args = parser.parse_args()
    samples = np.random.default_rng(0).normal(size=(args.rounds, *SHAPE))
    samples = samples.astype("float32")
    results = {}
    for units in (16, 64, 256):
        with tempfile.TemporaryDirectory() as folder:
            results[units] = measure(units, samples, Path(folder))
    text = table(results)
    print(text)
    if args.out:
        packages = ("keras", "tensorflow", "ai-edge-litert")
        versions = {name: version(name) for name in packages}
        record = {"versions": versions, "results": results}
        (args.out / "deployment.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "deployment.md").write_text(text)


if __name__ == "__main__":
    main()
