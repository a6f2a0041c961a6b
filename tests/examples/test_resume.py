"""Runs that are interrupted, short of disk space, or resumed wrongly."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import time_machine
from helpers import common, resume

EXAMPLE = Path(time_machine.__file__)
# Adam's state must be restored, too.
SMALL = ["--quick", "--units", "8", "--batch-size", "4", "--num-steps", "5"]
PATIENCE = 900  # seconds, for a slow machine


@pytest.fixture(scope="module", autouse=True)
def without_generated_texts():
    """They take much of the time, and follow from the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_machine, "generate", lambda *_: "")
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A small run of one layer, on a text of its own."""
    text = tmp_path_factory.mktemp("text") / "own.txt"
    text.write_text("a traveller in time " * 15)
    return ["--text", str(text), "--layer", "ScratchLSTM", *SMALL]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert time_machine.main([*arguments, "--epochs", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """The output folder of a run of two epochs."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def epochs_in(out):
    return max(resume.checkpoints(out / "checkpoints", "ScratchLSTM"), default=0)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_bit_identical(out, expected_out):
    """Compare models, optimizers and results, except for times."""
    runs = []
    for folder in (out, expected_out):
        model = keras.saving.load_model(folder / "ScratchLSTM.keras")
        variables = [*model.weights, *model.optimizer.variables]
        arrays = [keras.ops.convert_to_numpy(v).tobytes() for v in variables]
        (result,) = json.loads((folder / "results.json").read_text())["runs"]
        for key in ("seconds", "tokens_per_sec", "closing_line"):
            assert result.pop(key)
        history = (folder / "history.csv").read_text().splitlines()
        runs.append((arrays, result, [row.rpartition(",")[0] for row in history]))
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_interrupted_run_resumes_bit_identically(tmp_path, arguments):
    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    command = [sys.executable, EXAMPLE, *arguments, "--epochs", "100000", "--out", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            progress = ""
            while "tokens/s" not in progress:
                assert process.poll() is None, progress
                progress += process.stderr.read(1)
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # else `with` would wait for it
    assert process.returncode == 1
    assert "Traceback" not in errors
    epochs = epochs_in(out)
    assert epochs >= 1
    assert (
        f"Interrupted after {epochs} finished epochs (ScratchLSTM {epochs}). "
        "To continue, run the same command with --resume." in errors
    )
    assert "\nScratchLSTM: perplexity " in printed
    arguments = [*arguments, "--epochs", str(epochs + 2)]
    assert time_machine.main([*arguments, "--out", str(out), "--resume"]) == 0
    assert time_machine.main([*arguments, "--out", str(uninterrupted)]) == 0
    assert_bit_identical(out, uninterrupted)


@pytest.mark.one_backend
@pytest.mark.slow
def test_resume_with_other_settings_is_rejected(tmp_path, arguments, out):
    before = contents(out)
    changed = tmp_path / "changed.txt"
    changed.write_text(Path(arguments[1]).read_text().replace("a", "b", 1))
    for more, change in [
        (["--seed", "7"], "seed=7 (was 2)"),
        (["--text", str(changed)], "text="),
    ]:
        message = time_machine.main([*arguments, *more, "--resume", "--out", str(out)])
        rule = "--resume must have the settings of the interrupted run. Received: "
        assert message.startswith(f"time_machine.py: error: {rule}{change}")
        assert contents(out) == before


@pytest.mark.one_backend
@pytest.mark.slow
def test_damaged_checkpoints(arguments, out, finished, capsys):
    folder = out / "checkpoints"
    arguments = [*arguments, "--out", str(out), "--epochs", "2", "--resume"]
    path = folder / "ScratchLSTM-2.keras"
    path.write_bytes(path.read_bytes()[:-100])
    assert time_machine.main(arguments) == 0  # trains the epoch again
    assert f"{path} is damaged. Trying the previous" in capsys.readouterr().out
    assert_bit_identical(out, finished)
    for path in folder.glob("*.keras"):
        path.write_bytes(b"damaged")
    message = time_machine.main(arguments)
    assert f"{folder} must have an intact checkpoint of ScratchLSTM" in message


@pytest.mark.one_backend
@pytest.mark.slow
def test_non_finite_epoch_of_a_new_run_is_not_saved(
    arguments, out, monkeypatch, capsys
):
    """It keeps the checkpoints of the earlier run in the folder."""
    finite = []

    class Spoil(time_machine.ResetStates):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                bias = self.model.get_layer("logits").bias
                bias.assign(np.full(bias.shape, np.inf))
            else:
                finite.extend(self.model.get_weights())

    monkeypatch.setattr(time_machine, "ResetStates", Spoil)
    earlier = contents(out / "checkpoints")
    message = time_machine.main([*arguments, "--epochs", "3", "--out", str(out)])
    failure = "epoch 2 gave a loss or weight that is not finite"
    assert message == f"ScratchLSTM: {failure}."
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert (run["epochs"], run["failure"]) == (epochs_in(out), failure) == (1, failure)
    saved = keras.saving.load_model(out / "ScratchLSTM.keras").get_weights()
    for weight, expected in zip(saved, finite, strict=True):
        np.testing.assert_array_equal(weight, expected)
    renamed = out / "checkpoints-1"
    assert f"Earlier checkpoints are in {renamed}." in capsys.readouterr().out
    assert {renamed / path.name: earlier[path] for path in earlier} == contents(renamed)


@pytest.mark.one_backend
@pytest.mark.slow
def test_checkpoint_that_cannot_be_written(arguments, out):
    """As in a kill at that moment, the logs are an epoch ahead of the weights."""
    arguments = [*arguments, "--out", str(out), "--resume", "--epochs", "3"]
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    buffer = io.StringIO()  # The limit also holds for pytest's capture.
    try:
        with contextlib.redirect_stdout(buffer), contextlib.redirect_stderr(buffer):
            message = time_machine.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path, reason = out / "checkpoints/ScratchLSTM-3.keras", os.strerror(errno.EFBIG)
    assert message == f"time_machine.py: error: {path} cannot be written: {reason}."
    after = contents(out)
    logs = out / "checkpoints" / "ScratchLSTM.json"
    assert after.pop(logs) != before[logs]
    assert after.items() <= before.items()
    assert time_machine.main(arguments) == 0
    assert epochs_in(out) == 3
    assert len(json.loads(logs.read_text())["loss"]) == 3


@pytest.mark.one_backend
def test_output_folder_that_cannot_be_used(tmp_path, arguments):
    file, used = tmp_path / "file", tmp_path / "used"
    file.write_text("mine")
    with common.lock(used):
        before = {*used.iterdir()}
        for out, rule in {
            file: "is writable",
            file / "below": "is writable",
            used: "no other run is using",
        }.items():
            message = time_machine.main([*arguments, "--out", str(out)])
            rule = f"--out must be a folder that {rule}. Received: {out}"
            assert message == f"time_machine.py: error: {rule}"
        assert {*used.iterdir()} == before
    assert file.read_text() == "mine"
