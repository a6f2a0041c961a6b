import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed
import keras
import numpy as np
import pytest
import time_machine
from helpers import resume

EXAMPLE = Path(distributed.__file__)
BACKEND = keras.backend.backend()
SMALL = ["--units", "8", "--batch-size", "8", "--num-steps", "6", "--epochs", "3"]
PATIENCE = 500  # seconds, for a slow machine


def case(backends, *values):
    """Parameters for some backends only."""
    skip = pytest.mark.skipif(BACKEND not in backends, reason=f"for {backends} only")
    return pytest.param(*values, marks=skip)


def start(arguments, processes):
    """Starts the example in one process, or in a cluster of some."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = ["--cluster"] if processes > 1 else []
    variables = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": coordinator,
        "KERAS_DISTRIBUTION_NUM_PROCESSES": str(processes),
        "JAX_PLATFORMS": "cpu",
    }
    return [
        subprocess.Popen(
            [sys.executable, EXAMPLE, *arguments, *cluster],
            env=os.environ | variables | {"KERAS_DISTRIBUTION_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def launch(arguments, processes):
    """Runs the example to its end; returns the outputs of all processes."""
    started = start(arguments, processes)
    try:
        outputs = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in outputs]


def train_on_one_device(arguments):
    """Returns the history of a plain `fit`, without any distribution."""
    args = time_machine.parse_arguments(arguments)
    _, vocabulary, batches = time_machine.load_data(args)
    model = time_machine.create_model("ScratchLSTM", args, vocabulary)
    return model.fit(
        batches,
        epochs=args.epochs,
        steps_per_epoch=batches.steps_per_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[time_machine.ResetStates()],
    ).history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "processes", "source", "sampling"),
    [
        case("jax", 4, 1, "--text", "random"),
        case("jax", None, 2, "--stream", "sequential"),
        case("tensorflow", 2, 1, "--stream", "random"),
    ],
)
def test_results_equal_those_of_one_device(
    text, out, devices, processes, source, sampling
):
    arguments = [*SMALL, "--sampling", sampling]
    more = [source, str(text), "--out", str(out)]
    if devices:
        more += ["--virtual-devices", str(devices)]
    printed, *others = launch([*arguments, *more], processes)
    history = json.loads((out / "history.json").read_text())
    expected = train_on_one_device([*arguments, "--text", str(text)])
    for key in ("loss", "perplexity"):
        assert len(set(expected[key])) == 3
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)
    assert f"{devices or processes} replicas: " in printed
    assert re.search(r"^perplexity \S+, \S+ tokens/sec", printed, re.M)
    assert "    time traveller" in printed
    assert not any("loss" in printed for printed in others)
    model = keras.saving.load_model(out / "model.keras")
    assert model.get_layer("rnn").cell.units == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "processes"), [case("jax", None, 2), case("tensorflow", 2, 1)]
)
def test_killed_run_resumes_bit_identically(text, out, tmp_path, devices, processes):
    arguments = [*SMALL, "--text", str(text)]
    if devices:
        arguments += ["--virtual-devices", str(devices)]
    endless = [*arguments, "--epochs", "1000000", "--out", str(out)]
    started = start(endless, processes)
    deadline = time.monotonic() + PATIENCE
    try:
        while (
            max(resume.checkpoints(out / "checkpoints", "ScratchLSTM"), default=0) < 2
        ):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
    finally:
        for process in reversed(started):  # a lost process; the others are stuck
            process.kill()
            process.communicate()
    epochs = max(resume.checkpoints(out / "checkpoints", "ScratchLSTM"))
    arguments += ["--epochs", str(epochs + 1)]
    launch([*arguments, "--out", str(out), "--resume"], processes)
    launch([*arguments, "--out", str(tmp_path / "other")], processes)
    runs = []
    for folder in (out, tmp_path / "other"):
        history = json.loads((folder / "history.json").read_text())
        weights = keras.saving.load_model(folder / "model.keras").get_weights()
        runs.append((history["loss"], [weight.tobytes() for weight in weights]))
    assert len(runs[0][0]) == epochs + 1
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        case(
            "jax tensorflow",
            ["--batch-size", "7", "--virtual-devices", "2"],
            "--batch-size must be a multiple of the number of replicas, 2. Received: 7",
        ),
        case("jax", ["--cluster"], "--cluster needs a launcher: "),
        case("tensorflow", ["--cluster"], "--cluster and sequential --sampling need"),
        case("torch", [], "KERAS_BACKEND must be jax or tensorflow. Received: torch"),
    ],
)
@pytest.mark.slow
def test_invalid_arguments(text, out, arguments, message):
    arguments = [*SMALL, "--text", str(text), "--out", str(out), *arguments]
    command = [sys.executable, EXAMPLE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert f"distributed.py: error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
