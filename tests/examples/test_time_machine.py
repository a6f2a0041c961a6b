import csv
import json
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import time_machine
from PIL import Image
from reference import run_python

EXAMPLE = Path(time_machine.__file__)
BACKEND = keras.backend.backend()
SMALL = ["--epochs", "2", "--units", "8", "--batch-size", "4", "--num-steps", "5"]
SMALL += ["--max-tokens", "500"]


@pytest.fixture
def text(tmp_path, rng):
    path = tmp_path / "own.txt"
    path.write_text("".join(rng.choice(list("abc \n"), 1000)))
    return path


def read(out):
    with open(out / "history.csv") as file:
        history = list(csv.DictReader(file))
    return json.loads((out / "results.json").read_text())["runs"], history


def name_in_book(run):
    """The device that the backend reported, as the book names it."""
    kind, number = re.search(r"(cpu|gpu|cuda)\W?(\d*)$", run["device"].lower()).groups()
    return f"/{'CPU' if kind == 'cpu' else 'GPU'}:{number or 0}"


def test_report(book, out, capsys):
    arguments = ["--text", str(book), "--out", str(out), "--device", "/CPU:0", *SMALL]
    assert time_machine.main(arguments) == 0
    printed = capsys.readouterr().out
    runs, history = read(out)
    names = ["ScratchLSTMCell", "LSTMCell", "ScratchLSTM"]
    assert [run["layer"] for run in runs] == names
    for run in runs:
        name = run["layer"]
        assert (run["backend"], run["epochs"], run["failure"]) == (BACKEND, 2, None)
        assert run["text"] == {"source": str(book), "is_the_book": True}
        rows = [row for row in history if row["layer"] == name]
        assert [row["epoch"] for row in rows] == ["1", "2"]
        # 500 characters are 24 batches of 4 x 5 at the latest offset.
        seconds = sum(24 * 20 / float(row["tokens_per_sec"]) for row in rows)
        assert run["tokens_per_sec"] == pytest.approx(2 * 24 * 20 / seconds)
        assert float(rows[-1]["perplexity"]) == run["perplexity"]
        line = f"perplexity {run['perplexity']:.1f}, {run['tokens_per_sec']:.1f} "
        assert run["closing_line"] == line + f"tokens/sec on {name_in_book(run)}"
        assert f"{name}: {run['closing_line']}\n" in printed
        model = keras.saving.load_model(out / f"{name}.keras")
        assert model.get_layer("rnn").cell.units == 8
        for prefix in ("time traveller", "traveller"):
            assert run["samples"][prefix].startswith(prefix)
            assert f"    {run['samples'][prefix]}\n" in printed
        assert "</html>" in (out / f"{name}.html").read_text()
    # The same initial weights and batches give the same numbers.
    cell, builtin, layer = (run["perplexity"] for run in runs)
    assert cell == pytest.approx(builtin, rel=1e-4)
    if BACKEND != "jax":  # where Keras's RNN carries no states within `fit`
        assert cell == pytest.approx(layer, rel=1e-4)
    with Image.open(out / "perplexity.png") as image:
        assert min(image.size) > 500


@pytest.mark.slow
def test_quick_run_ends_in_words(book, out):
    arguments = ["--quick", "--text", str(book), "--out", str(out)]
    arguments += ["--units", "128", "--batch-size", "8", "--max-tokens", "3000"]
    assert time_machine.main([*arguments, "--layer", "ScratchLSTM"]) == 0
    (run,), history = read(out)
    assert len(history) == 60
    assert run["perplexity"] < 1.5
    last = [float(row["perplexity"]) for row in history[-50:]]
    assert run["median_perplexity"] == pytest.approx(np.median(last))
    model = keras.saving.load_model(out / "ScratchLSTM.keras")
    assert isinstance(model.optimizer, keras.optimizers.Adam)
    tokens = time_machine.tokenize(book.read_text())
    vocabulary = time_machine.Vocabulary(tokens)
    words = {*"".join(tokens).split()}
    for prefix, sample in run["samples"].items():
        assert time_machine.generate(model, vocabulary, prefix) == sample
        *complete, _ = sample.split()
        known = [word in words for word in complete[2:]]
        assert np.mean(known) > 0.6


def test_quick_sets_defaults(capsys):
    args = time_machine.parse_arguments(["--quick", "--epochs", "3"])
    assert (args.epochs, args.learning_rate) == (3, 0.005)
    with pytest.raises(SystemExit):
        time_machine.parse_arguments(["--quick", "--compare-d2l"])
    assert "--compare-d2l: not allowed with argument --quick" in capsys.readouterr().err


def test_training_runs_under_a_device_strategy(text, out, monkeypatch, capsys):
    """States start at zero in each epoch."""
    seen, largest = [], []

    class Spy(time_machine.ResetStates):
        def on_epoch_begin(self, epoch, logs=None):
            self.measure()
            super().on_epoch_begin(epoch, logs)
            self.measure()

        def measure(self):
            states = self.model.get_layer("rnn").states
            largest.append(np.abs([*map(keras.ops.convert_to_numpy, states)]).max())

        def on_train_batch_end(self, batch, logs=None):
            seen.append((self.model, keras.ops.zeros(1).device))

    monkeypatch.setattr(time_machine, "ResetStates", Spy)
    arguments = ["--text", str(text), "--out", str(out), *SMALL]
    assert time_machine.main([*arguments, "--layer", "ScratchLSTMCell"]) == 0
    assert f"{text}: results do not compare with" in capsys.readouterr().out
    ((run,), _), ((model, used), *_) = read(out), seen
    assert run["text"] == {"source": str(text), "is_the_book": False}
    assert model.get_layer("rnn").stateful
    *_, before, after = largest
    assert before > 0 or BACKEND == "jax"  # see `test_report`
    assert after == 0
    assert run["device"] == str(model.weights[0].value.device) == str(used)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        assert isinstance(model.distribute_strategy, tf.distribute.OneDeviceStrategy)
        devices = model.distribute_strategy.extended.worker_devices
        assert devices == (run["device"],)


def test_devices_that_do_not_exist(text, out):
    for device in ("/GPU:7", "cpu:9", "abacus", ""):
        arguments = ["--text", str(text), "--out", str(out), "--device", device]
        answer = time_machine.main(arguments)
        assert re.fullmatch(
            r"time_machine\.py: error: --device must be one of .*cpu:0\. "
            rf"Received: {device}",
            answer,
        )
    assert not out.exists()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="d2l's loop needs tensorflow")
@pytest.mark.slow
def test_compare_d2l(text, out, capsys):
    pytest.importorskip("d2l.tensorflow", reason="the extra `d2l` is not installed")
    text.write_text("a traveller in time " * 50)
    arguments = ["--text", str(text), "--out", str(out), *SMALL, "--compare-d2l"]
    assert time_machine.main([*arguments, "--layer", "LSTMCell"]) == 0
    runs, history = read(out)
    assert [run["layer"] for run in runs] == ["LSTMCell", "d2l"]
    assert [row["layer"] for row in history].count("d2l") == 2
    printed = capsys.readouterr().out
    assert re.search(r"^d2l: perplexity \S+, \S+ tokens/sec on /.PU:0$", printed, re.M)
    assert runs[1]["samples"]["traveller"].startswith("traveller")


def test_compare_d2l_without_d2l(text, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "helpers.d2l_lstm", None)
    arguments = ["--text", str(text), "--out", str(out), *SMALL, "--compare-d2l"]
    message = time_machine.main(arguments)
    assert "--compare-d2l needs the tensorflow backend, and d2l: run" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--units", "0"], "--units: must be a positive integer. Received: '0'"),
        (["--batch-size", "1.5"], "must be a positive integer. Received: '1.5'"),
        (["--learning-rate", "nan"], "must be a positive number. Received: 'nan'"),
        (["--seed", "-1"], "must be an integer in [0, 2**32). Received: '-1'"),
    ],
    ids=" ".join,
)
def test_invalid_arguments(arguments, message, out, capsys):
    with pytest.raises(SystemExit, match="2"):
        time_machine.main([*arguments, "--out", str(out)])
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["--text", "."], "cannot be read: Is a directory"),
        (["--max-tokens", "25"], "must have at least 26 characters for a batch of"),
    ],
    ids=" ".join,
)
def test_unusable_text(arguments, message, out, text):
    answer = time_machine.main(["--text", str(text), *SMALL, *arguments, "--out", "x"])
    assert re.match(r"time_machine\.py: error: [^\n]*$", answer)
    assert message in answer
    assert not Path("x").exists()


@pytest.mark.one_backend
@pytest.mark.parametrize("name", [path.stem for path in EXAMPLE.parent.glob("*.py")])
def test_help_does_not_import_keras(name):
    code = f"""
import atexit, runpy, sys
atexit.register(lambda: print("keras" in sys.modules or "numpy" in sys.modules))
sys.argv = ["{name}.py", "--help"]
runpy.run_path("{EXAMPLE.with_name(name)}.py", run_name="__main__")
"""
    printed = run_python("-c", code, PYTHONPATH=str(EXAMPLE.parent))
    assert f"python examples/{name}.py" in printed
    assert "None" not in printed
    assert printed.endswith("False\n")
