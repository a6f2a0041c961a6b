"""Benchmark training against the built-in layers, native PyTorch and d2l.

    python benchmarks/throughput.py            main table, all backends
    python benchmarks/throughput.py --quick    in three minutes, without memory
    python benchmarks/throughput.py --grid     batch size by units
    python benchmarks/throughput.py --steps    long sequences
    python benchmarks/throughput.py --small    models of numbers, as in forecasting
    python benchmarks/throughput.py --cells    variants of the cell
    python benchmarks/throughput.py --padded   sequences of random length

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
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from contenders import (
    VOCABULARY,
    contenders,
    forecasters,
    keras_contender,
    layers,
    variants,
)
from inference import measure_inference
from measuring import (
    BACKENDS,
    PAIRS,
    host,
    interleave,
    matmul_gflops,
    peak_memory,
    rates,
    ratios,
    seconds,
)


def flop_per_token(units):
    """FLOP of all matmuls in the forward and backward pass."""
    forward = 2 * 4 * units * (VOCABULARY + units) + 2 * units * VOCABULARY
    return 3 * forward - 2 * 4 * units * VOCABULARY  # the input needs no gradient


def measure_main(backend, options):
    shape, units = (options.batches, options.batch, options.time), options.units
    separate = (
        {} if options.measure == "quick" else measure_in_processes(backend, options)
    )
    functions = {}
    for name, make in contenders(backend).items():
        functions[name] = make(units, shape)
        functions[name]()  # compiles
    times = interleave(functions, options.rounds)
    tokens = shape[0] * shape[1] * shape[2]
    speeds = rates(times, tokens)
    for name, speed in speeds.items():
        gflops = flop_per_token(units) * speed["median"] / 1e9
        speed.update(separate.get(name, {}), gflops=gflops)
    return {
        "matmul_gflops": {
            "2048 × 2048 × 2048": matmul_gflops(2048, 2048, 2048),
            f"{shape[1]} × {units} × {4 * units}, one time step": matmul_gflops(
                shape[1], units, 4 * units
            ),
        },
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


def measure_cells(backend, options):
    """Speed of each variant of the cell, relative to `ScratchLSTM`."""
    shape, functions = (options.batches, options.batch, options.time), {}
    for name, make in variants().items():
        functions[name] = keras_contender(make)(options.units, shape)
        functions[name]()
    times = interleave(functions, options.rounds)
    standard = times.pop("ScratchLSTM")
    return {
        "ratios": {
            name: statistics.median(
                one / other for one, other in zip(standard, values, strict=True)
            )
            for name, values in times.items()
        }
    }


def measure_small(backend, options):
    """Training of small models, which are limited by per-op overhead."""
    found = []
    for time, features, units in SMALL:
        shape = options.batches, options.batch, time
        functions = forecasters(features, units, shape)
        for train in functions.values():
            train()
        times = interleave(functions, options.rounds)
        sizes = {"time": time, "features": features, "units": units}
        speeds = rates(times, math.prod(shape))
        found.append({**sizes, "tokens_per_sec": speeds, "ratios": ratios(times)})
    return {"models": found}


def measure_padded(backend, options):
    """Training on sequences of random length, with a mask."""
    shape, functions = (options.batches, options.batch, options.time), {}
    for name in ("LSTM", "ScratchLSTM"):
        make = keras_contender(layers()[name], padded=True)
        functions[name] = make(options.units, shape)
        functions[name]()
    times = interleave(functions, options.rounds)
    return {"tokens_per_sec": rates(times, math.prod(shape)), "ratios": ratios(times)}


SMALL = [(30, 8, 64), (100, 64, 128)]  # time steps, features, units
MEASURES = {
    "main": measure_main,
    "quick": measure_main,
    "grid": measure_grid,
    "steps": measure_steps,
    "inference": measure_inference,
    "cells": measure_cells,
    "padded": measure_padded,
    "small": measure_small,
}


# --- report -----------------------------------------------------------------


def table(results):
    """The main table in Markdown, below the hosts."""
    # The matmuls of the backends differ, so the peak is that of the fastest.
    peak = max(max(found["matmul_gflops"].values()) for found in results.values())
    lines = [describe(backend, found) for backend, found in results.items()]
    lines += [
        "",
        "| backend | contender | tokens/s (min–max) | first call | "
        "peak memory | share of peak |",
        "|---|---|---|---|---|---|",
    ]
    for backend, found in results.items():
        for name, speed in found["tokens_per_sec"].items():
            first, memory = (
                f"{speed[key]:{form}}" if key in speed else "–"
                for key, form in (("first_call_s", ".2f"), ("peak_memory_mb", ",.0f"))
            )
            lines.append(
                f"| {backend} | `{name}` | {speed['median']:,.0f} "
                f"({speed['min']:,.0f}–{speed['max']:,.0f}) | "
                f"{first} s | {memory} MB | {speed['gflops'] / peak:.0%} |"
            )
    measured = {title for found in results.values() for title in found["ratios"]}
    titles = [title for title in PAIRS if title in measured]
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


def describe(backend, found):
    """One line on the host and its matmuls."""
    machine = found["machine"]
    settings = (f"{name}={value}" for name, value in machine["environment"].items())
    peaks = (
        f"{gflops:,.0f} GFLOP/s ({sizes})"
        for sizes, gflops in found["matmul_gflops"].items()
    )
    facts = [
        *filter(None, [machine.get("gpu")]),
        f"{machine['cores']} cores of {machine['processor']}",
        "vector extensions: " + " ".join(machine["vector_extensions"]),
        *settings,
        "matmuls: " + ", ".join(peaks),
        machine["date"],
    ]
    return f"- {backend}: {'; '.join(facts)}"


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
    if options.measure in ("main", "quick"):
        (path.with_suffix(".md")).write_text(table(merged) + "\n")
        print(table(merged))
    if options.measure == "main":
        draw(merged, options.out)
    if options.measure not in ("main", "quick"):
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
    for name in ("quick", "grid", "steps", "inference", "cells", "padded", "small"):
        which.add_argument(
            f"--{name}", dest="measure", action="store_const", const=name
        )
    parser.set_defaults(measure="main")
    parser.add_argument("--rounds", type=number, help="default: 21; quick: 7")
    parser.add_argument(
        "--batches", type=number, help="minibatches per round; default: 20; quick: 10"
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
    quick = options.measure == "quick"
    options.rounds = options.rounds or (7 if quick else 21)
    options.batches = options.batches or (10 if quick else 20)
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    if "--only" in options.given:
        at = options.given.index("--only")
        del options.given[at : at + 2]
    return options


if __name__ == "__main__":
    main()
