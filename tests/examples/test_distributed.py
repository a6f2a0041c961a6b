import contextlib
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
SMALL = ["--units", "8", "--batch-size", "8", "--num-steps", "6"]
PATIENCE = 500  # seconds, for a slow machine
pytestmark = pytest.mark.slow


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


def start_and_kill(arguments, processes, checkpoints):
    """Kills the example after some epochs, and returns their number."""
    started = start([*arguments, "--epochs", "1000000"], processes)
    deadline = time.monotonic() + PATIENCE
    try:
        while max(resume.checkpoints(checkpoints, "ScratchLSTM"), default=0) < 2:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in started)
            time.sleep(0.1)
    finally:
        for process in reversed(started):  # a lost process; the others are stuck
            process.kill()
            process.communicate()
    return max(resume.checkpoints(checkpoints, "ScratchLSTM"))


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


@pytest.mark.skipif(BACKEND == "torch", reason="not on torch")
def test_killed_and_resumed_run_equals_one_on_one_device(text, out):
    """On JAX, two processes have two devices each."""
    is_jax = BACKEND == "jax"
    processes, source, sampling = (
        (2, "--text", "sequential") if is_jax else (1, "--stream", "random")
    )
    options = [*SMALL, "--sampling", sampling]
    arguments = [*options, source, str(text), "--out", str(out)]
    arguments += ["--virtual-devices", "2"]
    epochs = start_and_kill(arguments, processes, out / "checkpoints") + 1
    options += ["--epochs", str(epochs)]
    printed, *others = launch(
        [*arguments, "--epochs", str(epochs), "--resume"], processes
    )
    history = json.loads((out / "history.json").read_text())
    expected = train_on_one_device([*options, "--text", str(text)])
    for key in ("loss", "perplexity"):
        assert len(set(expected[key])) == epochs
        np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)
    assert f"{2 * processes} replicas: " in printed
    assert re.search(r"^perplexity \S+, \S+ tokens/sec", printed, re.M)
    assert "    time traveller" in printed
    assert not any("loss" in printed for printed in others)
    model = keras.saving.load_model(out / "model.keras")
    assert model.get_layer("rnn").cell.units == 8


def test_invalid_arguments(text, out, monkeypatch):
    two = contextlib.nullcontext((["cpu:0", "cpu:1"], 0, 1))
    message = "--batch-size must be a multiple of the number of replicas, 2. Received:"
    cases = {
        "tensorflow": {
            ("--batch-size", "7"): message,
            ("--cluster",): "--cluster and sequential --sampling need",
        },
        "jax": {
            ("--cluster",): "--cluster needs a launcher: ",
            ("--batch-size", "7"): message,
        },
        "torch": {(): "KERAS_BACKEND must be jax or tensorflow. Received: torch"},
    }
    arguments = [*SMALL, "--text", str(text), "--out", str(out)]
    for more, message in cases[BACKEND].items():
        with monkeypatch.context() as patch:
            if "--batch-size" in more:
                patch.setattr(distributed, "distribution", lambda args: two)
            answer = distributed.main([*arguments, *more])
        assert answer.startswith(f"distributed.py: error: {message}")
