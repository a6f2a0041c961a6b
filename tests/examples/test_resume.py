"""Runs that are killed, interrupted, short of disk space, or resumed wrongly."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import time_machine
from helpers import common, resume

EXAMPLE = Path(time_machine.__file__)
SMALL = ["--units", "8", "--batch-size", "4", "--num-steps", "5", "--max-tokens", "300"]
KILLS = 3
PATIENCE = 900  # seconds, for a slow machine


@pytest.fixture
def arguments(tmp_path, rng):
    """A small run of one layer, on a text of its own."""
    text = tmp_path / "own.txt"
    text.write_text("".join(rng.choice(list("abc \n"), 600)))
    return ["--text", str(text), "--layer", "ScratchLSTM", *SMALL]


@pytest.fixture
def two_layers(monkeypatch):
    """Those that `--layer all` trains."""
    layers = dict(time_machine.LAYERS)
    del layers["LSTMCell"]
    monkeypatch.setattr(time_machine, "LAYERS", layers)
    return layers


@pytest.fixture
def start_process(monkeypatch):
    """Starts functions in processes that have imported the example and nothing else."""
    path = [str(EXAMPLE.parent), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["time_machine"])
    started = []

    def start(target, *args):
        started.append(context.Process(target=target, args=args))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def run(arguments):
    sys.exit(time_machine.main(arguments))


def wait_until(process, condition, *args):
    """Waits until a condition holds, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition(*args) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def finished_epochs(out, name="ScratchLSTM"):
    return max(resume.checkpoints(out / "checkpoints", name), default=0)


def saved_arrays(path):
    """All arrays of a `.keras` file: weights, and variables of the optimizer."""
    arrays = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with zipfile.ZipFile(path) as archive:
        h5py.File(archive.open("model.weights.h5")).visititems(add)
    return arrays


def assert_bit_identical(out, expected_out, name="ScratchLSTM"):
    """Compares weights, optimizer, logs and report, except for the times."""
    runs = []
    for folder in (out, expected_out):
        paths = resume.checkpoints(folder / "checkpoints", name)
        path = paths[max(paths)]
        arrays = {key: value.tobytes() for key, value in saved_arrays(path).items()}
        assert len(arrays) > 6  # the weights of the layer, and more
        logs = json.loads((folder / "checkpoints" / f"{name}.json").read_text())
        model = keras.saving.load_model(folder / f"{name}.keras")
        weights = [weight.tobytes() for weight in model.get_weights()]
        results = json.loads((folder / "results.json").read_text())["runs"]
        (result,) = (result for result in results if result["layer"] == name)
        for key in ("seconds", "tokens_per_sec", "closing_line"):
            assert result.pop(key)
        logs = logs["loss"], logs["perplexity"]
        runs.append((path.name, arrays, logs, weights, result))
    assert runs[0] == runs[1]


# --- killed ------------------------------------------------------------------


@pytest.mark.slow
def test_run_killed_at_random_moments_is_bit_identical(
    tmp_path, arguments, start_process, rng
):
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    endless = [*arguments, "--epochs", "1000000", "--out", str(out), "--resume"]
    before = 0
    for number in range(KILLS):
        process = start_process(run, endless)
        moment = ["anywhere", "after an epoch", "while writing"][number % 3]
        if moment != "anywhere":
            wait_until(process, lambda before=before: finished_epochs(out) > before)
        if moment == "while writing":
            wait_until(process, lambda: any(out.glob("checkpoints/unfinished-*")))
        else:
            time.sleep(rng.uniform(0, 3 if moment == "anywhere" else 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        print(f"kill {number + 1}, {moment}: {finished_epochs(out)} epochs")
        assert finished_epochs(out) >= before
        before = finished_epochs(out)
    assert before >= 2 * KILLS // 3
    for more in (["--out", str(out), "--resume"], ["--out", str(uninterrupted)]):
        process = start_process(run, [*arguments, "--epochs", str(before + 2), *more])
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert_bit_identical(out, uninterrupted)
    assert not list(out.rglob("unfinished-*"))


# --- interrupted -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("signals", [["SIGINT"], ["SIGTERM", "SIGINT"]])
def test_interrupted_run_says_how_to_resume(tmp_path, arguments, signals):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, *arguments, "--epochs", "100000", "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        progress = ""
        while "tokens/s" not in progress:
            progress += process.stderr.read(1)
        for name in signals:
            process.send_signal(getattr(signal, name))
            time.sleep(0.01)
        try:
            printed, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # else `with` would wait for it
    assert process.returncode == 1
    assert "Traceback" not in errors
    epochs = finished_epochs(out)
    assert epochs >= 1
    assert (
        f"Interrupted after {epochs} finished epochs (ScratchLSTM {epochs}). "
        "To continue, run the same command with --resume." in errors
    )
    if len(signals) == 1:
        assert re.search(r"^ScratchLSTM: perplexity ", printed, re.MULTILINE)
        (result,) = json.loads((out / "results.json").read_text())["runs"]
        assert result["epochs"] == epochs


@pytest.mark.slow
def test_second_interrupt_counts_the_saved_epochs(tmp_path, arguments, monkeypatch):
    """In the fourth epoch come two signals, the second before its end."""
    reset = time_machine.ResetStates.on_epoch_begin

    def interrupt(callback, epoch, logs=None):
        reset(callback, epoch, logs)
        if epoch == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(time_machine.ResetStates, "on_epoch_begin", interrupt)
    handlers = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    out = ["--out", str(tmp_path / "out"), "--layer", "all"]
    message = time_machine.main([*arguments, "--epochs", "9", *out])
    assert message == (
        "Interrupted after 3 finished epochs "
        "(ScratchLSTMCell 3, LSTMCell 0, ScratchLSTM 0). "
        "To continue, run the same command with --resume."
    )
    assert handlers == [
        signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)
    ]


@pytest.mark.ci
def test_second_run_with_one_output_folder_is_rejected(tmp_path, arguments):
    out = tmp_path / "out"
    arguments = [*arguments, "--epochs", "1", "--out", str(out)]
    rule = f"--out must be a folder that no other run is using. Received: {out}"
    with common.lock(out):
        before = set(out.iterdir())
        for more in ([], ["--resume"]):
            message = time_machine.main([*arguments, *more])
            assert message == f"time_machine.py: error: {rule}"
        assert set(out.iterdir()) == before
    assert time_machine.main(arguments) == 0


# --- resumed -----------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_resumed_run_is_bit_identical(tmp_path, arguments, two_layers):
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    arguments = [*arguments, "--layer", "all"]
    for epochs in ("1", "3"):
        more = ["--epochs", epochs, "--out", str(out), "--resume"]
        assert time_machine.main([*arguments, *more]) == 0
    more = ["--epochs", "3", "--out", str(uninterrupted)]
    assert time_machine.main([*arguments, *more]) == 0
    for name in two_layers:
        assert_bit_identical(out, uninterrupted, name)


@pytest.mark.one_backend
@pytest.mark.slow
def test_resume_with_other_settings_is_rejected(tmp_path, arguments):
    out, text = tmp_path / "out", Path(arguments[1])
    arguments = [*arguments, "--out", str(out), "--epochs", "1"]
    assert time_machine.main(arguments) == 0
    before = contents(out)
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text().replace("a", "b", 1))
    for more, change in [
        (["--seed", "7"], "seed=7 (was 2)"),
        (["--units", "9"], "units=9 (was 8)"),
        (["--text", str(changed)], "text="),
    ]:
        message = time_machine.main([*arguments, *more, "--resume"])
        rule = "--resume must have the settings of the interrupted run. Received: "
        assert message.startswith(f"time_machine.py: error: {rule}{change}")
        assert contents(out) == before


@pytest.mark.one_backend
@pytest.mark.slow
def test_damaged_and_earlier_checkpoints(tmp_path, arguments, capsys):
    out = tmp_path / "out"
    folder = out / "checkpoints"
    arguments = [*arguments, "--out", str(out), "--epochs", "3"]
    assert time_machine.main(arguments) == 0
    path = folder / "ScratchLSTM-3.keras"
    expected = saved_arrays(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert time_machine.main([*arguments, "--resume"]) == 0  # trains the epoch again
    assert f"{path} is damaged. Trying the previous" in capsys.readouterr().out
    for key, array in saved_arrays(path).items():
        np.testing.assert_array_equal(array, expected[key])

    earlier = contents(folder)
    assert time_machine.main([*arguments, "--epochs", "1"]) == 0
    renamed = out / "checkpoints-1"
    assert f"Earlier checkpoints are in {renamed}." in capsys.readouterr().out
    assert {renamed / path.name: earlier[path] for path in earlier} == contents(renamed)
    assert finished_epochs(out) == 1

    (folder / "ScratchLSTM-1.keras").write_bytes(b"damaged")
    message = time_machine.main([*arguments, "--resume"])
    assert f"{folder} must have an intact checkpoint of ScratchLSTM" in message


@pytest.mark.slow
@pytest.mark.usefixtures("two_layers")
def test_non_finite_epoch_is_not_saved(tmp_path, arguments, monkeypatch):
    """Of two layers, one fails in its third epoch; the other is trained."""
    out = tmp_path / "out"
    reset, weights = time_machine.ResetStates.on_epoch_begin, []

    def spoil(callback, epoch, logs=None):
        reset(callback, epoch, logs)
        if epoch == 2 and not weights:
            weights.extend(callback.model.get_weights())
            bias = callback.model.get_layer("logits").bias
            bias.assign(np.full_like(weights[-1], np.nan))

    monkeypatch.setattr(time_machine.ResetStates, "on_epoch_begin", spoil)
    more = ["--layer", "all", "--epochs", "4", "--out", str(out)]
    message = time_machine.main([*arguments, *more])
    failure = "epoch 3 gave a loss or weight that is not finite"
    assert message == f"ScratchLSTMCell: {failure}."
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["epochs"] for run in runs] == [2, 4]
    assert [run["failure"] for run in runs] == [failure, None]
    saved = keras.saving.load_model(out / "ScratchLSTMCell.keras").get_weights()
    for weight, expected in zip(saved, weights, strict=True):
        np.testing.assert_array_equal(weight, expected)


class OneWeight:
    """What `Checkpoint` needs of a model."""

    def __init__(self, value):
        self.value = np.full(1000, value)

    def get_weights(self):
        return [self.value]

    def save(self, path):
        with open(path, "wb") as file:
            np.savez(file, self.value)

    def load_weights(self, path):
        with np.load(path) as file:
            self.value = file["arr_0"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weight_is_not_saved(tmp_path, value):
    checkpoint = resume.Checkpoint(tmp_path, "run", OneWeight(1))
    checkpoint.on_epoch_end(0, {"loss": 1.0})
    checkpoint.model.value = np.append(np.zeros(999), value)
    checkpoint.on_epoch_end(1, {"loss": 1.0})
    assert checkpoint.model.stop_training
    checkpoint.on_train_end()
    np.testing.assert_array_equal(checkpoint.model.value, np.full(1000, 1))
    assert list(resume.checkpoints(tmp_path, "run")) == [1]


# --- disks -------------------------------------------------------------------


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "name"), [("3", "checkpoints/ScratchLSTM-3"), ("2", "ScratchLSTM")]
)
def test_file_that_cannot_be_written(tmp_path, arguments, epochs, name):
    """A checkpoint, and the model of a run that is resumed at its end."""
    out = tmp_path / "out"
    arguments = [*arguments, "--out", str(out), "--resume", "--epochs"]
    assert time_machine.main([*arguments, "2"]) == 0
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    buffer = io.StringIO()  # The limit also holds for pytest's capture.
    try:
        with contextlib.redirect_stdout(buffer), contextlib.redirect_stderr(buffer):
            message = time_machine.main([*arguments, epochs])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path, reason = out / f"{name}.keras", os.strerror(errno.EFBIG)
    assert message == f"time_machine.py: error: {path} cannot be written: {reason}."
    after = contents(out)
    assert after.pop(out / "checkpoints" / "ScratchLSTM.json")  # may be an epoch ahead
    assert after.items() <= before.items()
    assert time_machine.main([*arguments, "3"]) == 0
    assert finished_epochs(out) == 3


@pytest.mark.one_backend
def test_output_folder_that_is_not_writable(tmp_path, arguments):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        message = time_machine.main([*arguments, "--out", str(out)])
        assert message.startswith(
            "time_machine.py: error: --out must be a folder that is writable. "
            f"Received: {out}"
        )
    assert file.read_text() == "mine"
