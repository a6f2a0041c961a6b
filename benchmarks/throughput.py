"""Benchmark the layers against the built-in ones, native PyTorch and d2l.

    python benchmarks/throughput.py                     main table, all backends
    python benchmarks/throughput.py --grid              batch size by units
    python benchmarks/throughput.py --steps             long sequences
    python benchmarks/throughput.py --inference         forward pass and generation

All contenders of a backend run interleaved in one process, so that other load affects
them alike: compare the ratios, not the absolute numbers of two runs. The main table is
printed in Markdown. All results are written to `--out` as JSON, with a chart of the
main table.

Training is `model.fit` with default settings on one-hot characters: an LSTM and a dense
layer for the logits. Tokens/s are those of one epoch of `--batches` minibatches, after
a first call that compiles. The time that `fit` takes after the epoch is excluded: on
TensorFlow it waits for a polling `tf.data` thread, whatever the layer.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

BACKENDS = ("tensorflow", "jax", "torch")
VOCABULARY = 28
PAIRS = {  # title of the ratio: numerator, denominator
    "`ScratchLSTM` / `LSTM`": ("ScratchLSTM", "LSTM"),
    "`RNN(ScratchLSTMCell)` / `RNN(LSTMCell)`": (
        "RNN(ScratchLSTMCell)",
        "RNN(LSTMCell)",
    ),
    "`ScratchLSTM` / native PyTorch loop": ("ScratchLSTM", "torch.nn.LSTM"),
    "`ScratchLSTM` / `torch.nn.LSTM` in `fit`": ("ScratchLSTM", "torch.nn.LSTM in fit"),
    "`ScratchLSTM` / d2l loop": ("ScratchLSTM", "d2l"),
}


# --- contenders ----------------------------------------------------------------


def layers():
    """Keras layers: name to a function of units and keyword arguments."""
    import keras

    from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

    def in_rnn(cell):
        return lambda units, **kwargs: keras.layers.RNN(cell(units), **kwargs)

    return {
        "RNN(LSTMCell)": in_rnn(keras.layers.LSTMCell),
        "LSTM": keras.layers.LSTM,
        "RNN(ScratchLSTMCell)": in_rnn(ScratchLSTMCell),
        "ScratchLSTM": ScratchLSTM,
    }


def random_text(shape):
    """One-hot random tokens, and their next tokens as targets."""
    import numpy as np

    batches, batch, steps = shape
    tokens = np.random.default_rng(0).integers(
        VOCABULARY, size=(batches * batch, steps + 1)
    )
    one_hot = np.eye(VOCABULARY, dtype="float32")
    return one_hot[tokens[:, :-1]], tokens[:, 1:].astype("int32")


def build_model(make_layer, units, shape):
    import keras

    model = keras.Sequential(
        [
            keras.Input((shape[2], VOCABULARY)),
            make_layer(units, return_sequences=True),
            keras.layers.Dense(VOCABULARY),
        ]
    )
    model.compile(
        keras.optimizers.SGD(1.0, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def keras_contender(make_layer):
    import keras

    def make(units, shape):
        model, (x, y) = build_model(make_layer, units, shape), random_text(shape)

        class Clock(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                self.start = time.perf_counter()

            def on_epoch_end(self, epoch, logs=None):
                self.seconds = time.perf_counter() - self.start

        def train(batches=shape[0]):
            rows, clock = batches * shape[1], Clock()
            model.fit(
                x[:rows], y[:rows], batch_size=shape[1], verbose=0, callbacks=[clock]
            )
            return clock.seconds

        return train

    return make


def native_torch(units, shape):
    import torch

    lstm = torch.nn.LSTM(VOCABULARY, units, batch_first=True)
    logits = torch.nn.Linear(units, VOCABULARY)
    parameters = [*lstm.parameters(), *logits.parameters()]
    optimizer = torch.optim.SGD(parameters, 1.0)
    loss = torch.nn.CrossEntropyLoss()
    x, y = (torch.tensor(values) for values in random_text(shape))
    x, y = x.split(shape[1]), y.long().split(shape[1])

    def train(batches=shape[0]):
        for X, Y in zip(x[:batches], y[:batches], strict=True):
            optimizer.zero_grad()
            scores = logits(lstm(X)[0])
            loss(scores.flatten(0, 1), Y.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    return train


def torch_in_fit(units, shape):
    """`torch.nn.LSTM` in `model.fit`, which shows the overhead of `fit`."""
    import keras
    import torch

    class LSTM(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(VOCABULARY, units, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    def make_layer(units, return_sequences):
        shape_out = (None, shape[2], units)
        return keras.layers.TorchModuleWrapper(LSTM(), output_shape=shape_out)

    return keras_contender(make_layer)(units, shape)


def d2l_loop(units, shape):
    """The from-scratch training loop of d2l, as in the example."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import d2l_lstm
    import keras
    import tensorflow as tf
    from d2l import tensorflow as d2l

    net = d2l.RNNModelScratch(
        VOCABULARY,
        units,
        d2l_lstm.zero_state,
        d2l_lstm.lstm,
        d2l_lstm.lstm_parameters,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    updater = keras.optimizers.SGD(1.0)
    x, y = random_text(shape)
    x = tf.constant(x.argmax(-1).reshape(*shape))
    y = tf.constant(y.reshape(*shape))

    def train(batches=shape[0]):
        minibatches = list(zip(x[:batches], y[:batches], strict=True))
        d2l.train_epoch_ch8(net, minibatches, loss, updater, use_random_iter=True)

    return train


def contenders(backend):
    found = {name: keras_contender(make) for name, make in layers().items()}
    if importlib.util.find_spec("torch"):
        found["torch.nn.LSTM"] = native_torch
    if backend == "torch":
        found["torch.nn.LSTM in fit"] = torch_in_fit
    if backend == "tensorflow" and importlib.util.find_spec("d2l"):
        found["d2l"] = d2l_loop
    return found


# --- measurements -----------------------------------------------------------------


def seconds(function, *arguments):
    """Run time of a function, unless it returns its own measurement."""
    start = time.perf_counter()
    measured = function(*arguments)
    elapsed = time.perf_counter() - start
    return measured if isinstance(measured, float) else elapsed


def interleave(functions, rounds):
    """Seconds per function and round. Each round starts with another function."""
    times = {name: [] for name in functions}
    names = list(functions)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            times[name].append(seconds(functions[name]))
    return times


def rates(times, work):
    """Median, minimum and maximum of work per second."""
    found = {}
    for name, values in times.items():
        speeds = sorted(work / value for value in values)
        found[name] = {
            "median": statistics.median(speeds),
            "min": speeds[0],
            "max": speeds[-1],
        }
    return found


def ratios(times):
    """Median over the rounds of the ratio of two speeds within a round."""
    return {
        title: statistics.median(
            slow / fast for fast, slow in zip(times[above], times[below], strict=True)
        )
        for title, (above, below) in PAIRS.items()
        if above in times and below in times
    }


def matmul_peak():
    """Best GFLOP/s of the backend's matmul of two 2048 × 2048 matrices."""
    import keras
    import numpy as np

    size = 2048
    a = keras.ops.convert_to_tensor(np.ones((size, size), "float32"))

    def matmul():
        keras.ops.convert_to_numpy(a @ a)[0, 0]

    matmul()
    return 2 * size**3 / min(seconds(matmul) for _ in range(10)) / 1e9


def flop_per_token(units):
    """FLOP of all matmuls in the forward and backward pass."""
    forward = 2 * 4 * units * (VOCABULARY + units) + 2 * units * VOCABULARY
    return 3 * forward - 2 * 4 * units * VOCABULARY  # the input needs no gradient


def measure_main(backend, options):
    shape, units = (options.batches, options.batch, options.time), options.units
    separate = measure_in_processes(backend, options)
    functions = {}
    for name, make in contenders(backend).items():
        functions[name] = make(units, shape)
        functions[name]()  # compiles
    times = interleave(functions, options.rounds)
    tokens = shape[0] * shape[1] * shape[2]
    speeds = rates(times, tokens)
    for name, speed in speeds.items():
        gflops = flop_per_token(units) * speed["median"] / 1e9
        speed.update(separate[name], gflops=gflops)
    return {
        "matmul_gflops": matmul_peak(),
        "tokens_per_sec": speeds,
        "ratios": ratios(times),
    }


def measure_in_processes(backend, options):
    """Peak memory and duration of the first call, as medians over processes."""
    runs = {name: [] for name in contenders(backend)}
    for _ in range(min(5, options.rounds)):
        for name, found in runs.items():
            found.append(run_process(backend, name, options))
    return {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }


def run_process(backend, name, options):
    """First call and peak memory of one contender in its own process."""
    command = [sys.executable, __file__, *options.given, "--alone", name]
    command += ["--only", backend]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{name}` on {backend} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(backend, options):
    shape = (options.batches, options.batch, options.time)
    import keras

    keras.ops.zeros(1)  # initializes the backend
    make = contenders(backend)[options.alone]
    train = make(options.units, shape)
    before = peak_memory()
    first = seconds(train, 1)
    train()
    return {"first_call_s": first, "peak_memory_mb": peak_memory() - before}


def peak_memory():
    """Peak memory of this process in megabytes."""
    for line in _lines("/proc/self/status"):
        # `ru_maxrss` would include the parent process.
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure_grid(backend, options):
    found = []
    for batch in options.grid_batches:
        for units in options.grid_units:
            tokens = options.batches * options.batch * options.time
            shape = (max(2, tokens // (batch * options.time)), batch, options.time)
            shape = (min(shape[0], options.batches), *shape[1:])
            functions = {}
            for name in ("LSTM", "ScratchLSTM"):
                functions[name] = contenders(backend)[name](units, shape)
                functions[name]()
            times = interleave(functions, options.rounds)
            ratio = ratios(times)["`ScratchLSTM` / `LSTM`"]
            found.append({"batch": batch, "units": units, "ratio": ratio})
            print(backend, found[-1], flush=True)
    return {
        "cells": found,
        "geometric_mean": statistics.geometric_mean(one["ratio"] for one in found),
        "min": min(one["ratio"] for one in found),
    }


def measure_steps(backend, options):
    """Milliseconds and megabytes per time step, for longer and longer sequences."""
    found = []
    for steps in options.step_counts:
        one = argparse.Namespace(**vars(options))
        one.given = [*options.given, "--time", str(steps), "--batches", "2"]
        functions, per_step = {}, {}
        for name in ("LSTM", "ScratchLSTM"):
            memory = run_process(backend, name, one)["peak_memory_mb"]
            per_step[f"mb_per_step_{name}"] = memory / steps
            shape = (2, options.batch, steps)
            functions[name] = contenders(backend)[name](options.units, shape)
            functions[name]()
        for name, values in interleave(functions, options.rounds).items():
            milliseconds = 1e3 * statistics.median(values) / (2 * steps)
            per_step[f"ms_per_step_{name}"] = milliseconds
        found.append({"steps": steps, **per_step})
        print(backend, found[-1], flush=True)
    return {"lengths": found}


def measure_inference(backend, options):
    """Forward pass over whole sequences, and generation of text."""
    import numpy as np

    shape, units = (1, options.batch, options.time), options.units
    x, _ = random_text(shape)
    functions = {}
    for name, make in layers().items():
        model = build_model(make, units, shape)
        functions[name] = lambda model=model: [
            model.predict_on_batch(x) for _ in range(options.batches)
        ]
        functions[name]()
    times = interleave(functions, options.rounds)
    tokens = options.batches * options.batch * options.time

    compiled, by_predict = generators(units, options.characters)
    start = np.array([[1]], "int32")
    assert (compiled(start) == by_predict(start)).all()
    few = max(1, options.characters // 20)
    generation = {"compiled loop": [], "`predict` per character": []}
    for _ in range(options.rounds):
        generation["compiled loop"].append(
            seconds(compiled, start) / options.characters
        )
        generation["`predict` per character"].append(
            seconds(by_predict, start, few) / few
        )
    compiled_times, predict_times = generation.values()
    return {
        "tokens_per_sec": rates(times, tokens),
        "ratios": ratios(times),
        "characters_per_sec": rates(generation, 1),
        "generation_ratio": statistics.median(
            slow / fast
            for fast, slow in zip(compiled_times, predict_times, strict=True)
        ),
    }


def generators(units, characters):
    """Two implementations of greedy generation, which give the same text."""
    import keras
    import numpy as np
    from keras import ops

    from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

    class Generator(keras.Model):
        """Generates all characters in one call, which `predict` compiles."""

        def __init__(self, cell, logits):
            super().__init__()
            self.cell, self.logits = cell, logits
            self.step = self.one_step
            if keras.backend.backend() == "torch":  # where Keras compiles nothing
                import torch

                # The default backend is half as fast again, but needs a C++ compiler.
                self.step = torch.compile(self.one_step, backend="eager")

        def one_step(self, token, h, c):
            x = ops.one_hot(token, VOCABULARY, dtype="float32")
            # `call` itself, since `__call__` would take most of the time.
            output, (h, c) = self.cell.call(x, [h, c])
            token = ops.cast(ops.argmax(self.logits.call(output), -1), "int32")
            return token, h, c

        def call(self, token):
            def body(k, carry):
                tokens, *carry = carry
                token, h, c = self.step(*carry)
                return ops.slice_update(tokens, (k,), token), token, h, c

            tokens = ops.zeros((characters,), "int32")
            h, c = self.cell.get_initial_state(batch_size=1)
            carry = tokens, token[:, 0], h, c
            return ops.fori_loop(0, characters, body, carry)[0][None]

    keras.utils.set_random_seed(0)
    cell = ScratchLSTMCell(units, recurrent_initializer="glorot_normal")
    logits = keras.layers.Dense(VOCABULARY)
    one_step = keras.Sequential(
        [
            keras.Input(batch_shape=(1, 1), dtype="int32"),
            keras.layers.Embedding(
                VOCABULARY, VOCABULARY, embeddings_initializer="identity"
            ),
            ScratchLSTM(cell=cell, stateful=True),
            logits,
        ]
    )
    generator = Generator(cell, logits)

    def compiled(token):
        return generator.predict_on_batch(token)[0]

    def by_predict(token, length=characters):
        one_step.layers[-2].reset_state()
        found = []
        for _ in range(length):
            token = one_step.predict(token, verbose=0).argmax(-1)[:, None]
            found.append(token.item())
        return np.array(found)

    return compiled, by_predict


MEASURES = {
    "main": measure_main,
    "grid": measure_grid,
    "steps": measure_steps,
    "inference": measure_inference,
}


# --- report -----------------------------------------------------------------


def host():
    import keras

    versions = {"keras": keras.__version__}
    for name in BACKENDS:
        if importlib.util.find_spec(name):
            versions[name] = importlib.import_module(name).__version__
    names = [
        line.partition(":")[2].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(results):
    """The main table in Markdown."""
    # The matmuls of the backends differ, so the peak is that of the fastest.
    peak = max(found["matmul_gflops"] for found in results.values())
    lines = [
        "| backend | contender | tokens/s (min–max) | first call | "
        "peak memory | share of peak |",
        "|---|---|---|---|---|---|",
    ]
    for backend, found in results.items():
        for name, speed in found["tokens_per_sec"].items():
            lines.append(
                f"| {backend} | `{name}` | {speed['median']:,.0f} "
                f"({speed['min']:,.0f}–{speed['max']:,.0f}) | "
                f"{speed['first_call_s']:.2f} s | {speed['peak_memory_mb']:,.0f} MB | "
                f"{speed['gflops'] / peak:.0%} |"
            )
    titles = list(PAIRS)
    lines += [
        "",
        f"| backend | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for backend, found in results.items():
        cells = (found["ratios"].get(title) for title in titles)
        shown = ("–" if cell is None else f"{cell:.2f}" for cell in cells)
        lines.append(f"| {backend} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(results, folder):
    """Plot the tokens/s of all contenders, as PNG and SVG."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(4 * len(results), 3), squeeze=False, sharex=True
    )
    for ax, (backend, found) in zip(axes[0], results.items(), strict=True):
        speeds = found["tokens_per_sec"]
        names = list(speeds)[::-1]
        low, medians, high = (
            [speeds[name][key] / 1e3 for name in names]
            for key in ("min", "median", "max")
        )
        spread = np.abs(np.subtract([low, high], medians))
        colors = ["#0072b2" if "Scratch" in name else "#999999" for name in names]
        ax.barh(names, medians, xerr=spread, color=colors, ecolor="#333333")
        ax.set_title(backend)
        ax.set_xlabel("thousand tokens/s")
        ax.tick_params(labelsize=8)
    figure.tight_layout()
    for extension in ("png", "svg"):
        figure.savefig(folder / f"throughput.{extension}", dpi=120)
    return figure


def main(arguments=None):
    options = parse(arguments)
    if options.alone:
        print(json.dumps(measure_alone(options.only, options)))
        return
    if options.only:
        measure = MEASURES[options.measure]
        result = {"machine": host(), **measure(options.only, options)}
        print(json.dumps(result))
        return
    results = {}
    for backend in options.backend:
        command = [sys.executable, __file__, *options.given, "--only", backend]
        done = subprocess.run(
            command,
            env={**os.environ, "KERAS_BACKEND": backend},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"The benchmark failed on {backend}.")
        results[backend] = json.loads(done.stdout.splitlines()[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.measure}.json"
    merged = json.loads(path.read_text()) if path.exists() else {}
    merged.update(results)
    merged = {backend: merged[backend] for backend in BACKENDS if backend in merged}
    path.write_text(json.dumps(merged, indent=2) + "\n")
    if options.measure == "main":
        (options.out / "main.md").write_text(table(merged) + "\n")
        print(table(merged))
        draw(merged, options.out)
    else:
        print(json.dumps(results, indent=2))


def parse(arguments):
    def number(argument):
        if not argument.isdecimal() or int(argument) == 0:
            raise argparse.ArgumentTypeError(
                f"must be a positive integer. Received: {argument!r}"
            )
        return int(argument)

    def numbers(argument):
        return [number(one) for one in argument.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    which = parser.add_mutually_exclusive_group()
    for name in ("grid", "steps", "inference"):
        which.add_argument(
            f"--{name}", dest="measure", action="store_const", const=name
        )
    parser.set_defaults(measure="main")
    parser.add_argument("--rounds", type=number, default=21)
    parser.add_argument(
        "--batches", type=number, default=20, help="minibatches per round"
    )
    parser.add_argument("--batch", type=number, default=32)
    parser.add_argument("--time", type=number, default=35, help="time steps")
    parser.add_argument("--units", type=number, default=256)
    parser.add_argument(
        "--characters", type=number, default=1000, help="characters to generate"
    )
    parser.add_argument("--grid-batches", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--grid-units", type=numbers, default=[64, 128, 256, 512])
    parser.add_argument(
        "--step-counts", type=numbers, default=[16, 64, 256, 1024, 2048]
    )
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default)
    # For the processes that this script starts.
    parser.add_argument("--only", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    if "--only" in options.given:
        at = options.given.index("--only")
        del options.given[at : at + 2]
    return options


if __name__ == "__main__":
    main()
