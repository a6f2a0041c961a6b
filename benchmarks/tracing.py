"""Compare the time of traces and experiments with that of a forward pass.

    KERAS_BACKEND=jax python benchmarks/tracing.py

The model has one-hot characters, one recurrent layer and logits. For every kind of
layer, this measures `model.predict_on_batch`, `trace_gates`, `run_with_edits`,
`trace_gradients` and the ablation of one unit by `ablate_units`, in turn. It prints a
Markdown table of medians and, with `--first`, one of the first calls, which compile.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from keras_scratch_lstm import (
    Edit,
    ScratchLSTM,
    ScratchLSTMCell,
    ablate_units,
    run_with_edits,
    trace_gates,
    trace_gradients,
)

VOCABULARY = 28


class CoupledCell(ScratchLSTMCell):
    """A custom cell with coupled input and forget gates."""

    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


LAYERS = {
    "`LSTM`": lambda units: keras.layers.LSTM(units, return_sequences=True),
    "`RNN(LSTMCell)`": lambda units: keras.layers.RNN(
        keras.layers.LSTMCell(units), return_sequences=True
    ),
    "`ScratchLSTM`": lambda units: ScratchLSTM(units, return_sequences=True),
    "`RNN(ScratchLSTMCell)`": lambda units: keras.layers.RNN(
        ScratchLSTMCell(units), return_sequences=True
    ),
    "`ScratchLSTM`, custom gates": lambda units: ScratchLSTM(
        cell=CoupledCell(units), return_sequences=True
    ),
    "`Bidirectional(LSTM)`": lambda units: keras.layers.Bidirectional(
        keras.layers.LSTM(units, return_sequences=True)
    ),
}


def build(layer):
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(
                VOCABULARY, VOCABULARY, embeddings_initializer="identity"
            ),
            layer,
            keras.layers.Dense(VOCABULARY),
        ]
    )


def calls_of(model, x):
    lstm = getattr(model.layers[1], "forward_layer", model.layers[1])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ablate = {"loss": loss, "layer": lstm, "units": 0, "verbose": 0}
    edit = {"edits": Edit("h", 0.0, units=[0]), "layer": lstm}
    return {
        "forward": lambda: model.predict_on_batch(x),
        "trace": lambda: trace_gates(model, x),
        "edit": lambda: run_with_edits(model, x, **edit),
        "gradient": lambda: trace_gradients(model, x, x, loss=loss, layer=lstm),
        "ablation": lambda: ablate_units(model, x, x, **ablate),
    }


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(calls, rounds):
    """Return the first and the median seconds of each; they are called in turn."""
    first = {name: seconds_of(call) for name, call in calls.items()}
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    return first, {name: np.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", action="store_true", help="also print first calls")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = args.batch_size, args.num_steps
    x = rng.integers(0, VOCABULARY, shape).astype("int32")
    print(
        f"{keras.backend.backend()}, Keras {keras.__version__}, batch {shape[0]} x "
        f"{shape[1]} steps x {args.units} units; milliseconds, medians of "
        f"{args.rounds}\n"
    )
    print(
        "| layer | forward | trace | edit | gradient | ablation |\n" + "|---" * 6 + "|"
    )
    for name in args.layers:
        calls = calls_of(build(LAYERS[name](args.units)), x)
        first, medians = measure(calls, args.rounds)
        rows = {name: medians} | ({f"{name}, first": first} if args.first else {})
        for label, seconds in rows.items():
            row = " | ".join(f"{1e3 * value:.0f}" for value in seconds.values())
            print(f"| {label} | {row} |", flush=True)


if __name__ == "__main__":
    main()
