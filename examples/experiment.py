"""Experiment on a trained LSTM: which unit carries a number through time?

Trains a small LSTM to remember the first of 20 numbers. Then it silences each unit,
patches the cell state of another run, and attributes the output to the time steps.

    python examples/experiment.py
"""

import sys
from pathlib import Path

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("experiment.py", __doc__)
    add, positive_integer = parser.add_argument, common.positive_integer
    add("--units", type=positive_integer, default=4, help="units of the LSTM")
    add("--steps", type=positive_integer, default=20, help="time steps")
    add("--epochs", type=positive_integer, default=40, help="for training")
    add("--seed", type=common.seed, default=2, help="for data and training")
    add("--out", type=Path, default=Path("runs/experiment"), help="output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import keras
import numpy as np
from keras.regularizers import L1

from keras_scratch_lstm import (
    Edit,
    ScratchLSTM,
    ablate_units,
    attribute,
    contextual_decomposition,
    plotting,
    run_with_edits,
    trace_gradients,
)


def main(argv=None):
    args = parse_arguments(argv)
    with common.lock(args.out):
        keras.utils.set_random_seed(args.seed)
        model, x, y = train(ScratchLSTM(args.units, name="lstm"), args)
        simple, *_ = train(keras.layers.SimpleRNN(args.units, name="rnn"), args)
        unit = find_unit(model, x, y, args.out)
        patch(model, x, unit)
        explain(model, x, args.out)
        compare_gradients({"LSTM": model, "SimpleRNN": simple}, x, y, args.out)
    print(f"Plots: {args.out}")
    return 0


def train(layer, args):
    """Trains a model to output the first number; returns it and test data."""
    rng = np.random.default_rng(args.seed)
    x = rng.uniform(-1, 1, (2256, args.steps, 1)).astype("float32")
    x = np.concatenate([x, np.zeros_like(x)], axis=-1)
    x[:, 0, 1] = 1  # marks the number to remember
    y = x[:, 0, :1]
    # L1 makes the output read few units.
    output = keras.layers.Dense(1, kernel_regularizer=L1(0.01), name="output")
    inputs = keras.Input((args.steps, 2))
    model = keras.Sequential([inputs, layer, output])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x[256:], y[256:], batch_size=64, epochs=args.epochs, verbose=2)
    x, y = x[:256], y[:256]
    error = np.mean((model.predict(x, verbose=0) - y) ** 2)
    print(f"{layer.name}: mean squared error {error:.4f}")
    return model, x, y


def find_unit(model, x, y, out):
    """Silences each unit; returns the one that changes the loss most."""
    ablation = ablate_units(model, x, y, method="mean", verbose=0)
    unit = int(ablation.unit[np.argmax(ablation.change)])
    print(f"unit {unit}: silencing it changes the loss by {max(ablation.change):+.4f}")
    plotting.plot_ablation(ablation, path=out / "ablation.png")
    return unit


def patch(model, x, unit):
    """Patches the cell state of one unit, from a run with other numbers."""
    others = x[::-1]
    outputs, _ = run_with_edits(model, x, edits=[])
    expected, trace = run_with_edits(model, others, edits=[])
    patched, _ = run_with_edits(model, x, edits=Edit("c", trace, units=unit, steps=-1))
    moved = np.polyfit((expected - outputs)[:, 0], (patched - outputs)[:, 0], 1)[0]
    print(f"patching c of unit {unit}: the output moves {moved:.0%} of the way")


def explain(model, x, out):
    """Attributes the outputs to the time steps, by two methods."""
    gradients = attribute(model, x, target=0).scores.sum(axis=-1)
    contributions = [
        contextual_decomposition(model, x, steps=t, head="output").beta[:, -1, 0]
        for t in range(x.shape[1])
    ]
    tokens = [f"{number:+.1f}" for number in x[0, :, 0]]
    for name, scores in (
        ("integrated_gradients", gradients),
        ("contextual_decomposition", np.stack(contributions, axis=1)),
    ):
        variance = scores.var(axis=0)
        share = variance[0] / variance.sum()
        print(f"{name}: the first time step has {share:.0%} of the variance")
        plotting.plot_attribution(scores[0], tokens=tokens, path=out / f"{name}.png")


def compare_gradients(models, x, y, out):
    """Compares how much of the gradient reaches the first time step."""
    traces = {name: trace_gradients(model, x, y) for name, model in models.items()}
    for name, trace in traces.items():
        norms = np.linalg.norm(trace.h, axis=-1).mean(axis=0)
        share = norms[0] / norms[-1]
        print(f"{name}: |dL/dh| at the first time step is {share:.2g} of the last")
    plotting.plot_gradients(traces, path=out / "gradients.png")


if __name__ == "__main__":
    sys.exit(main())
