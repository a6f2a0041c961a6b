"""Interleaved times, their ratios, and what describes the host."""

import importlib.util
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
EXTENSIONS = ("avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_tile")
SETTINGS = ("OMP_", "MKL_", "ONEDNN_", "TF_ENABLE_ONEDNN_OPTS", "TF_NUM_", "XLA_FLAGS")
PAIRS = {  # title of the ratio: numerator, denominator
    "`ScratchLSTM` / `LSTM`": ("ScratchLSTM", "LSTM"),
    "`RNN(ScratchLSTMCell)` / `RNN(LSTMCell)`": (
        "RNN(ScratchLSTMCell)",
        "RNN(LSTMCell)",
    ),
    "`ScratchLSTM` / native PyTorch loop": ("ScratchLSTM", "torch.nn.LSTM"),
    "`ScratchLSTM` / `torch.nn.LSTM` in `fit`": ("ScratchLSTM", "torch.nn.LSTM in fit"),
    "`Bidirectional` of each": ("Bidirectional(ScratchLSTM)", "Bidirectional(LSTM)"),
    "`ScratchLSTM` / d2l loop": ("ScratchLSTM", "d2l"),
}


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


def matmul_gflops(m, k, n):
    """Best GFLOP/s of the backend's matmul of `(m, k)` and `(k, n)`."""
    import keras
    import numpy as np

    a, b = (
        keras.ops.convert_to_tensor(np.ones(shape, "float32"))
        for shape in ((m, k), (k, n))
    )
    repeats = min(100, 1 + 10**9 // (m * k * n))

    def matmuls():
        for _ in range(repeats):
            product = a @ b
        keras.ops.convert_to_numpy(product)

    matmuls()
    fastest = min(seconds(matmuls) for _ in range(10))
    return 2 * m * k * n * repeats / fastest / 1e9


def peak_memory():
    """Peak memory of this process in megabytes."""
    for line in _lines("/proc/self/status"):
        # `ru_maxrss` would include the parent process.
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def host():
    """What the results depend on: CPU, GPU, threads, settings and versions."""
    import keras

    versions = {"keras": keras.__version__}
    for name in BACKENDS:
        if importlib.util.find_spec(name):
            versions[name] = importlib.import_module(name).__version__
    cpu = {}
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        cpu.setdefault(name.strip(), value.strip())
    flags = cpu.get("flags", "").split()
    query = "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"
    return {
        "gpu": subprocess.check_output(query, text=True).strip()
        if shutil.which("nvidia-smi")
        else None,
        "processor": cpu.get("model name") or platform.processor(),
        "vector_extensions": [name for name in EXTENSIONS if name in flags],
        "cores": os.cpu_count(),
        # Variables that change the threads or the kernels of a backend.
        "environment": {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)},
        "python": platform.python_version(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []
