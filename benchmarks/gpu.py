"""Check and time the layers on a GPU, with one command.

    python benchmarks/gpu.py                   all backends, at most 12 minutes
    python benchmarks/gpu.py --backend torch   one of them, at most 4
    python benchmarks/gpu.py --dry-run         tiny sizes, on any host

Each backend runs in a process of its own. First it compares `fit` with a `ScratchLSTM`
and with a `keras.layers.LSTM` from the same weights, on the same data: `loss` is the
largest relative difference of the losses of two epochs, `update` the norm of the
difference of the final weights, relative to that of their change. Then it measures
ratios of training throughput in interleaved rounds. Each result is written at once to
`gpu.json` in `--out`, so that a run that is cut keeps what it has.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from contenders import (
    VOCABULARY,
    keras_contender,
    layers,
    native_torch,
    random_text,
)
from measuring import BACKENDS, host, interleave, ratios
from throughput import measure_cells, measure_padded

SECONDS = 240  # per backend
PARITY = {  # title: what differs from float32 without TF32, and the largest difference
    "float32": ({}, 1e-3),
    "jit_compile=True": ({"jit_compile": True}, 1e-3),
    "jit_compile=False": ({"jit_compile": False}, 1e-3),
    "left padding": ({"padding": "left"}, 1e-3),
    "right padding": ({"padding": "right"}, 1e-3),
    "mask with gaps": ({"padding": "gaps"}, 1e-3),
    "Bidirectional": ({"bidirectional": True}, 1e-3),
    "stateful": ({"stateful": True}, 1e-3),
    "TF32": ({"tf32": True}, 2e-2),
    "mixed_float16": ({"policy": "mixed_float16"}, 5e-2),
    "mixed_bfloat16": ({"policy": "mixed_bfloat16"}, 2e-1),
}
SIZES = [(32, 35, 256), (32, 100, 256), (32, 100, 1024), (256, 100, 256)]
SIZES += [(256, 100, 1024)]  # batch size, time steps, units


# --- parity ------------------------------------------------------------------


def compare(shape, units, case):
    """Train both layers, and return how much they differ."""
    import keras
    import numpy as np

    set_tf32(case.get("tf32", False))
    keras.config.set_dtype_policy(case.get("policy", "float32"))
    losses, before, after = {}, {}, {}
    try:
        for name in ("LSTM", "ScratchLSTM"):
            model = make_model(layers()[name], shape, units, case)
            before[name] = named_weights(name, model)
            try:
                losses[name] = train(model, shape, case)
            except Exception as error:  # on torch, stateful ones of Keras fail
                raise RuntimeError(f"`{name}` fails: {error}") from error
            after[name] = named_weights(name, model)
    finally:
        keras.config.set_dtype_policy("float32")
        set_tf32(False)
    np.testing.assert_array_equal(*before.values())
    expected, found = losses.values()
    change = np.linalg.norm(after["LSTM"] - before["LSTM"])
    return {
        "loss": float(np.max(np.abs(np.subtract(found, expected) / expected))),
        "update": float(np.linalg.norm(after["ScratchLSTM"] - after["LSTM"]) / change),
    }


def named_weights(name, model):
    """All weights in one vector, in the order of `ScratchLSTM`."""
    import numpy as np

    from keras_scratch_lstm import to_scratch

    model = to_scratch(model) if name == "LSTM" else model
    return np.concatenate([weight.ravel() for weight in model.get_weights()])


def make_model(make_layer, shape, units, case):
    import keras

    keras.utils.set_random_seed(0)
    stateful = case.get("stateful", False)
    batch = shape[1] if stateful else None
    layer = make_layer(units, return_sequences=True, stateful=stateful)
    if case.get("bidirectional"):
        layer = keras.layers.Bidirectional(layer)
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(batch, shape[2], VOCABULARY)),
            *([keras.layers.Masking()] if "padding" in case else []),
            layer,
            keras.layers.Dense(VOCABULARY, dtype="float32"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    jit_compile = case.get("jit_compile", "auto")
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=jit_compile)
    return model


def train(model, shape, case):
    """Train for two epochs, and return the loss of each batch."""
    import keras
    import numpy as np

    x, y = random_text(shape)
    rng, steps = np.random.default_rng(1), np.arange(shape[2])
    lengths = rng.integers(1, shape[2] + 1, size=(len(x), 1))
    is_padding = {
        None: np.zeros((len(x), shape[2]), bool),
        "left": steps < shape[2] - lengths,
        "right": steps >= lengths,
        "gaps": rng.random((len(x), shape[2])) < 0.3,
    }[case.get("padding")]
    x[is_padding] = 0
    losses = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])
    )
    options = {"batch_size": shape[1], "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(x, y, callbacks=[keep], **options)
    return losses


def set_tf32(enabled):
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(enabled)
    elif backend == "jax":
        import jax

        precision = "tensorfloat32" if enabled else "float32"
        jax.config.update("jax_default_matmul_precision", precision)
    else:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = enabled
        torch.backends.cudnn.allow_tf32 = enabled


# --- throughput --------------------------------------------------------------


def throughputs(backend, options):
    """Yield titles, and functions that return ratios."""
    for sizes in options.sizes:
        yield " × ".join(map(str, sizes)), partial(measure, sizes, options)
    usual = 32, options.time, options.units
    both = {
        name: lambda units, make=make, **kwargs: keras_bidirectional(
            make(units, **kwargs)
        )
        for name, make in layers().items()
    }
    yield "Bidirectional", partial(measure, usual, options, both)
    yield "padded", lambda: measure_padded(backend, options)["ratios"]
    yield "one time step", partial(measure_step, options)
    yield "cells / `ScratchLSTM`", lambda: measure_cells(backend, options)["ratios"]


def measure(sizes, options, makers=None):
    *shape, units = options.batches, *sizes
    functions, found = {}, makers or layers()
    for name in ("LSTM", "ScratchLSTM"):
        functions[name] = keras_contender(found[name])(units, shape)
    if makers is None and importlib.util.find_spec("torch"):
        functions["torch.nn.LSTM"] = native_torch(units, shape)
    for function in functions.values():
        function()  # compiles
    return ratios(interleave(functions, options.rounds))


def keras_bidirectional(layer):
    import keras

    return keras.layers.Bidirectional(layer)


def measure_step(options):
    """Inference of one time step, as in streaming."""
    import keras

    x, functions = random_text((1, 32, 1))[0], {}
    for name in ("LSTM", "ScratchLSTM"):
        layer = layers()[name](options.units)
        model = keras.Sequential([keras.Input((1, VOCABULARY)), layer])
        model.predict_on_batch(x)  # compiles

        def predict(model=model):
            for _ in range(20):
                model.predict_on_batch(x)

        functions[name] = predict
    return ratios(interleave(functions, options.rounds))


# --- command -----------------------------------------------------------------


def run(backend, options):
    """Measure one backend, and write each result at once."""
    start, found = time.monotonic(), {"machine": host(), "parity": {}, "ratios": {}}
    set_tf32(False)
    shape = options.batches, 32, options.time
    tasks = [
        ("parity", title, lambda case=case: compare(shape, options.units, case))
        for title, (case, _) in PARITY.items()
    ]
    tasks += [("ratios", *task) for task in throughputs(backend, options)]
    for kind, title, task in tasks:
        if time.monotonic() - start > SECONDS:
            found[kind][title] = "not reached within the time limit"
        else:
            try:
                found[kind][title] = task()
            except Exception as error:
                found[kind][title] = f"{type(error).__name__}: {error}"[:300]
        if kind == "parity" and isinstance(found[kind][title], dict):
            found[kind][title]["limit"] = PARITY[title][1]
        print(f"{backend}, {title}: {found[kind][title]}", flush=True)
        write(backend, found, options.out)


def write(backend, found, out):
    path = out / "gpu.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[backend] = found
    path.write_text(json.dumps(results, indent=2) + "\n")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--only", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = {"batch": 32, "rounds": 5, "batches": 20, "time": 35, "units": 256}
    if options.dry_run:
        sizes |= {"rounds": 1, "batches": 2, "time": 4, "units": 3}
    vars(options).update(sizes, sizes=[(2, 4, 3)] if options.dry_run else SIZES)
    return options


def main():
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only:
        run(options.only, options)
        return
    for backend in options.backend:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", backend]
        env = {**os.environ, "KERAS_BACKEND": backend}
        try:
            subprocess.run(command, env=env, timeout=SECONDS + 60)
        except subprocess.TimeoutExpired:
            print(f"{backend}: stopped after the time limit")


if __name__ == "__main__":
    main()
