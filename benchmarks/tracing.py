"""Compare the time of traces and interventions with that of a forward pass.

    KERAS_BACKEND=jax python benchmarks/tracing.py

The model has one-hot characters, one recurrent layer and logits. For every kind of
layer, this measures `trace_gates`, `run_with_edits`, `model.predict_on_batch`
(compiled) and `model(x)` (eager) in turn, and prints a Markdown table of medians and
ratios. Then it measures `ablate_units` of all units, once.
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


def wait_for(outputs):
    keras.ops.convert_to_numpy(outputs)  # waits for asynchronous execution


def measure(calls, rounds):
    """Return the median seconds of each function; they are called in turn."""
    seconds = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= 2:  # the first two compile
                seconds[name].append(time.perf_counter() - start)
    return {name: np.median(values) for name, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-steps", type=int, default=35)
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = args.batch_size, args.num_steps
    x = rng.integers(0, VOCABULARY, shape).astype("int32")
    print(
        f"{keras.backend.backend()}, Keras {keras.__version__}, batch {shape[0]} x "
        f"{shape[1]} steps x {args.units} units; milliseconds, medians of "
        f"{args.rounds}\n\n| layer | trace | edit | edit/trace | `predict_on_batch` | "
        "trace/predict | `model(x)` | trace/call |\n" + "|---" * 8 + "|",
        flush=True,
    )
    for name, make in LAYERS.items():
        model = build(make(args.units))
        lstm = getattr(model.layers[1], "forward_layer", model.layers[1])
        trace, edit, predict, call = measure(
            {
                "trace": lambda model=model: trace_gates(model, x),
                "edit": lambda model=model, lstm=lstm: run_with_edits(
                    model, x, edits=Edit("h", 0.0, units=[0]), layer=lstm
                ),
                "predict": lambda model=model: model.predict_on_batch(x),
                "call": lambda model=model: wait_for(model(x)),
            },
            args.rounds,
        ).values()
        print(
            f"| {name} | {trace * 1e3:.1f} | {edit * 1e3:.1f} | {edit / trace:.2f} | "
            f"{predict * 1e3:.1f} | "
            f"{trace / predict:.2f} | {call * 1e3:.1f} | {trace / call:.2f} |",
            flush=True,
        )
    model = build(LAYERS["`LSTM`"](args.units))
    start = time.perf_counter()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ablate_units(model, x, x, loss=loss, verbose=0)
    seconds = time.perf_counter() - start
    print(f"\nAblation of all {args.units} units of `LSTM`: {seconds:.1f} s")


if __name__ == "__main__":
    main()
