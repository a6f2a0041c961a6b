"""Compare size, latency and error of LiteRT files.

    python benchmarks/deployment.py --text timemachine.txt --out benchmarks/results

1. One layer, untrained: as a loop, unrolled, and as the fused op.
2. Trained models, quantized: the sensor signals of `examples/deploy.py`, and the next
   characters of a text that is not in the training data.

Batch size 1, one thread. The files take turns, so their latencies compare.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import deploy
import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from helpers.book_text import Minibatches, Vocabulary, load_text, tokenize

from keras_scratch_lstm import ScratchLSTM, export_litert

SHAPE = (20, 8)
HELD_OUT = 10_000  # characters


def export(model, path, samples, quantize=None):
    """An interpreter of the exported model; `"keras"` is Keras's own export."""
    if quantize == "keras":
        spec = keras.InputSpec(shape=(1, *samples.shape[1:]), dtype=samples.dtype.name)
        options = {"input_signature": [spec], "verbose": False}
        model.export(path, format="litert", **options)
    else:
        options = {"representative_data": samples, "verbose": False}
        export_litert(model, path, quantize=quantize, **options)
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


def compare(forms, calibration, samples, folder):
    """Exports models, and runs each on the samples.

    Args:
        forms: Dict of name to a pair of a model and its quantization.
        calibration: Array of representative inputs, the first axis for the samples.
        samples: Array of the inputs to run.
        folder: Path for the files.

    Returns:
        Dict of name to size and latency, and dict of name to outputs.
    """
    paths = {name: folder / f"{k}.tflite" for k, name in enumerate(forms)}
    runners = {
        name: export(model, paths[name], calibration, quantize)
        for name, (model, quantize) in forms.items()
    }
    seconds, outputs = ({name: [] for name in forms} for _ in range(2))
    for x in samples:
        for name, interpreter in runners.items():
            output, elapsed = run(interpreter, x[None])
            outputs[name].append(output[0])
            seconds[name].append(elapsed)
    results = {
        name: {
            "kB": paths[name].stat().st_size / 1000,
            "microseconds": float(np.median(seconds[name])) * 1e6,
        }
        for name in forms
    }
    return results, {name: np.stack(values) for name, values in outputs.items()}


def layer_forms(units, rounds, folder):
    """Results of one layer in four forms. The weights are random."""
    keras.utils.set_random_seed(0)
    loop, unrolled = (
        keras.Sequential([keras.Input(SHAPE), keras.layers.LSTM(units, unroll=unroll)])
        for unroll in (False, True)
    )
    unrolled.set_weights(loop.get_weights())
    samples = np.random.default_rng(0).normal(size=(rounds, *SHAPE)).astype("float32")
    forms = {
        "`LSTM`, loop": (loop, "keras"),
        "`LSTM`, `unroll=True`": (unrolled, "keras"),
        "`ScratchLSTM`": (loop, None),
        "`ScratchLSTM`, int8": (loop, "int8"),
    }
    results, outputs = compare(forms, samples, samples, folder)
    expected = loop.predict(samples, verbose=0)
    for name, result in results.items():
        result["difference"] = float(np.abs(outputs[name] - expected).max())
    return results


def sensor_task(rounds):
    """A trained model, calibration samples, test samples and their labels."""
    rng = np.random.default_rng(1)
    (calibration, _), test = deploy.signals(200, rng), deploy.signals(rounds, rng)
    return deploy.train(epochs=15), calibration, *test


def text_task(rounds, path, units=256, batch_size=32, steps=35, epochs=5):
    """The same for next characters. The model returns probabilities."""
    tokens = tokenize(load_text(path).characters)
    vocabulary = Vocabulary(tokens)
    corpus = vocabulary.encode(tokens)
    batches = Minibatches(corpus[:-HELD_OUT], batch_size, steps, "random", seed=0)
    keras.utils.set_random_seed(0)
    size = len(vocabulary)
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(size, size, "identity", trainable=False),
            ScratchLSTM(units, return_sequences=True),
            keras.layers.Dense(size, "softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.003), "sparse_categorical_crossentropy")
    each = batches.steps_per_epoch
    model.fit(batches, epochs=epochs, steps_per_epoch=each, shuffle=False, verbose=0)
    starts = np.random.default_rng(0).integers(HELD_OUT - steps, size=rounds)
    windows = corpus[-HELD_OUT:][starts[:, None] + np.arange(steps + 1)]
    return model, batches[0][0], windows[:, :-1], windows[:, 1:]


def quantized_forms(task, folder):
    """Results of a trained model in four number formats."""
    model, calibration, samples, labels = task
    forms = {name: (model, quantize) for name, quantize in deploy.FORMATS.items()}
    results, outputs = compare(forms, calibration, samples, folder)
    expected = model.predict(samples, verbose=0)
    for name, result in results.items():
        result["difference"] = float(np.abs(outputs[name] - expected).max())
        result["accuracy"] = float(np.mean(outputs[name].argmax(-1) == labels))
    return results


def tables(layers, trained):
    names = list(next(iter(layers.values())))
    rows = [
        ["layer", *(f"{units} units" for units in layers)],
        *([name, *map(cell(name), layers.values())] for name in names),
        ["task", "weights", "file, kB", "µs (median)", "difference", "accuracy"],
    ]
    for task, forms in trained.items():
        for name, form in forms.items():
            numbers = f"{form['kB']:.1f}", f"{form['microseconds']:.0f}"
            quality = f"{form['difference']:.0e}", f"{form['accuracy']:.1%}"
            rows.append([task, name, *numbers, *quality])
    lines = []
    for row in rows:
        head = row[0] in ("layer", "task")
        lines += [""] * (head and bool(lines)) + [f"| {' | '.join(row)} |"]
        lines += ["|" + "---|" * len(row)] * head
    return "\n".join(lines) + "\n"


def cell(name):
    """A function that formats one layer: size, latency, its ratio to the loop."""

    def text(forms):
        form, loop = forms[name], next(iter(forms.values()))
        ratio = form["microseconds"] / loop["microseconds"]
        return f"{form['kB']:.1f} kB, {form['microseconds']:.0f} µs ({ratio:.2f})"

    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500, help="samples per file")
    parser.add_argument("--text", type=Path, help="text to use, if not the book's")
    parser.add_argument("--out", type=Path, help="folder for deployment.json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        layers = {n: layer_forms(n, args.rounds, folder) for n in (16, 64, 256)}
        trained = {
            "sensor": quantized_forms(sensor_task(args.rounds), folder),
            "text": quantized_forms(text_task(args.rounds, args.text), folder),
        }
    text = tables(layers, trained)
    print(text)
    if args.out:
        packages = ("keras", "tensorflow", "ai-edge-litert")
        record = {
            "versions": {name: version(name) for name in packages},
            "layers": layers,
            "trained": trained,
        }
        (args.out / "deployment.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "deployment.md").write_text(text)


if __name__ == "__main__":
    main()
