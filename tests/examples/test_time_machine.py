import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import time_machine
from PIL import Image

from keras_scratch_lstm import ScratchLSTMCell

EXAMPLE = Path(time_machine.__file__)
SMALL = ["--epochs", "3", "--units", "8", "--batch-size", "4", "--num-steps", "5"]
SMALL += ["--max-tokens", "500"]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


@pytest.fixture
def own_text(tmp_path, rng):
    path = tmp_path / "own.txt"
    path.write_text("".join(rng.choice(list("abc \n"), 1000)))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "here"


def read(out):
    with open(out / "history.csv") as file:
        history = list(csv.DictReader(file))
    return json.loads((out / "results.json").read_text())["runs"], history


def test_the_whole_report(book, out, capsys):
    arguments = ["--text", str(book), "--out", str(out), *SMALL]
    assert time_machine.main(arguments) == 0
    printed = capsys.readouterr()
    runs, history = read(out)
    assert [run["cell"] for run in runs] == ["scratch", "builtin", "layer"]
    for run in runs:
        assert run["backend"] == keras.backend.backend()
        assert re.fullmatch(r"/[CG]PU:0", run["device"])
        assert run["epochs"] == 3
        assert run["text"] == {"source": str(book), "is_the_book": True}
        assert run["seconds"] > 0
        # 500 characters are 23 minibatches of 4 x 5 at the latest offset.
        tokens = 3 * 24 * 20
        assert run["tokens_per_sec"] == pytest.approx(tokens / run["seconds"])
        for prefix in ("time traveller", "traveller"):
            assert run["samples"][prefix].startswith(prefix)
            assert len(run["samples"][prefix]) == len(prefix) + 50
            assert f"    {run['samples'][prefix]}\n" in printed.out
        rows = [row for row in history if row["cell"] == run["cell"]]
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        assert float(rows[-1]["perplexity"]) == run["perplexity"]
        line = (
            f"{run['cell']}: perplexity {run['perplexity']:.1f}, "
            f"{run['tokens_per_sec']:.1f} tokens/sec on {run['device']}\n"
        )
        assert line in printed.out
        model = keras.saving.load_model(out / f"{run['cell']}.keras")
        assert model.get_layer("rnn").cell.units == 8
        assert f"Gates of {run['cell']}" in (out / f"{run['cell']}.html").read_text()
    assert "not comparable" not in printed.out
    assert "epoch 3: time traveller" in printed.out + printed.err
    # The same start and the same minibatches: the same numbers.
    scratch, builtin, layer = (run["perplexity"] for run in runs)
    assert scratch == pytest.approx(builtin, rel=1e-4)
    if keras.backend.backend() != "jax":  # where only the layer carries its states
        assert scratch == pytest.approx(layer, rel=1e-4)
    with Image.open(out / "perplexity.png") as image:
        width, height = image.size
    assert width > 900
    assert height > 500
    svg = (out / "perplexity.svg").read_text()
    assert svg.count("<svg") == 1


def test_the_trained_model_writes_the_reports_samples(own_text, out):
    time_machine.main(["--own-text", str(own_text), "--out", str(out), *SMALL])
    (run, *_), _ = read(out)
    model = keras.saving.load_model(out / "scratch.keras")
    vocabulary = time_machine.Vocabulary(time_machine.tokenize(own_text.read_text()))
    for prefix, sample in run["samples"].items():
        assert time_machine.generate(model, vocabulary, prefix) == sample


def test_the_picture_shows_the_numbers(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(time_machine.plt, "close", figures.append)
    book = {"source": "", "is_the_book": True}
    runs = [
        {"cell": name, "text": book, "history": {"perplexity": perplexity}}
        for name, perplexity in [
            ("scratch", [20.0, 9.0, 2.0]),
            ("builtin", [19.0, 3.0]),
        ]
    ]
    time_machine.draw(runs, tmp_path)
    (ax,) = figures[0].axes
    curves = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(curves["scratch"].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(curves["scratch"].get_ydata(), [20, 9, 2])
    np.testing.assert_array_equal(curves["builtin"].get_ydata(), [19, 3])
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() == "epoch"
    assert "perplexity" in ax.get_ylabel()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["scratch", "builtin"]


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_states_are_carried_within_an_epoch_alone(own_text, out, monkeypatch, sampling):
    if sampling == "sequential" and keras.backend.backend() == "jax":
        pytest.skip("on JAX, Keras's RNN carries no states within fit")
    seen = []
    reset = time_machine.ResetStates.on_epoch_begin

    def spy(callback, epoch, logs=None):
        states = callback.model.get_layer("rnn").states
        before = states and [np.abs(np.array(state)).max() for state in states]
        reset(callback, epoch, logs)
        after = states and [np.abs(np.array(state)).max() for state in states]
        seen.append((before, after))

    monkeypatch.setattr(time_machine.ResetStates, "on_epoch_begin", spy)
    arguments = ["--own-text", str(own_text), "--out", str(out), *SMALL]
    time_machine.main([*arguments, "--sampling", sampling, "--cell", "scratch"])
    assert len(seen) == 3
    if sampling == "random":
        assert seen == [(None, None)] * 3
    else:
        assert all(after == [0, 0] for _, after in seen)
        assert all(min(before) > 0 for before, _ in seen[1:])


def test_it_learns(own_text, out):
    own_text.write_text("abcdefgh" * 200)
    arguments = ["--own-text", str(own_text), "--out", str(out), *SMALL]
    time_machine.main([*arguments, "--epochs", "40", "--cell", "scratch"])
    (run,), history = read(out)
    assert run["perplexity"] < 1.2 < float(history[0]["perplexity"])
    model = keras.saving.load_model(out / "scratch.keras")
    assert isinstance(model.get_layer("rnn").cell, ScratchLSTMCell)
    vocabulary = time_machine.Vocabulary("abcdefgh")
    assert time_machine.generate(model, vocabulary, "abc", 10) == "abcdefghabcde"


def test_any_text_but_the_books_is_marked(own_text, out, capsys):
    arguments = ["--out", str(out), *SMALL, "--cell", "builtin"]
    time_machine.main(["--own-text", str(own_text), *arguments])
    assert "no numbers to compare with the book's" in capsys.readouterr().out
    (run,), _ = read(out)
    assert run["text"] == {"source": str(own_text), "is_the_book": False}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="d2l's loop needs tensorflow"
)
def test_compare_d2l(own_text, out, capsys):
    pytest.importorskip("d2l.tensorflow", reason="the extra `d2l` is not installed")
    own_text.write_text("a traveller in time " * 50)
    arguments = ["--own-text", str(own_text), "--out", str(out), *SMALL]
    assert time_machine.main([*arguments, "--cell", "scratch", "--compare-d2l"]) == 0
    runs, history = read(out)
    assert [run["cell"] for run in runs] == ["scratch", "d2l"]
    assert [row["cell"] for row in history].count("d2l") == 3
    printed = capsys.readouterr().out
    assert re.search(r"^d2l: perplexity \S+, \S+ tokens/sec on /.PU:0$", printed, re.M)
    assert runs[1]["samples"]["traveller"].startswith("traveller")


# --- wrong input -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--units", "0"], "argument --units: '0' came; expected a positive integer"),
        (["--units", "x"], "argument --units: 'x' came; expected a positive integer"),
        (["--epochs", "-1"], "argument --epochs: '-1' came; expected a positive"),
        (["--batch-size", "0"], "argument --batch-size: '0' came"),
        (["--num-steps", "1.5"], "argument --num-steps: '1.5' came"),
        (["--max-tokens", "0"], "argument --max-tokens: '0' came"),
        (["--learning-rate", "0"], "argument --learning-rate: '0' came; expected"),
        (["--learning-rate", "nan"], "argument --learning-rate: 'nan' came"),
        (["--learning-rate", "inf"], "argument --learning-rate: 'inf' came"),
        (["--seed", "-1"], "argument --seed: '-1' came; expected an integer from 0"),
        (["--cell", "gru"], "argument --cell: invalid choice: 'gru'"),
        (["--sampling", "odd"], "argument --sampling: invalid choice: 'odd'"),
        (["--text", "a", "--own-text", "b"], "not allowed with argument --text"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, message, out, capsys):
    with pytest.raises(SystemExit) as exit:
        time_machine.main([*arguments, "--out", str(out)])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("time_machine.py: error: ")
    assert message in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device", "/TPU:7"],
            "--device is '/TPU:7'; expected one that .* has here: /",
        ),
        (["--device", ""], "--device is ''; expected"),
        (["--text", "missing.txt"], "missing.txt cannot be read: No such file"),
        (["--own-text", "."], "cannot be read: Is a directory"),
        (
            ["--max-tokens", "25"],
            "has 25 characters; a minibatch of 4 x 5 needs at least 26",
        ),
    ],
    ids=" ".join,
)
def test_what_cannot_be_met(arguments, message, out, own_text):
    if "--text" not in arguments and "--own-text" not in arguments:
        arguments = ["--own-text", str(own_text), *arguments]
    answer = time_machine.main([*SMALL, *arguments, "--out", str(out)])
    assert re.match(r"time_machine\.py: error: [^\n]*$", answer)
    assert re.search(message, answer)
    assert not out.exists()


def test_a_changed_book_is_refused(tmp_path, out):
    path = tmp_path / "timemachine.txt"
    path.write_text("The Time Machine, abridged")
    answer = time_machine.main(["--text", str(path), "--out", str(out), *SMALL])
    assert f"{path} is not the book's text: its SHA-256 is" in answer
    assert not out.exists()


def test_out_that_cannot_be_written(tmp_path, own_text):
    arguments = ["--own-text", str(own_text), *SMALL]
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        answer = time_machine.main([*arguments, "--out", str(out)])
        assert re.match(
            rf"time_machine\.py: error: --out {out} cannot be written", answer
        )
    assert file.read_text() == "mine"


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the tensorflow backend's answers"
)
def test_compare_d2l_where_it_cannot_be(own_text, out, monkeypatch):
    arguments = ["--own-text", str(own_text), "--out", str(out), "--compare-d2l"]
    monkeypatch.setitem(sys.modules, "d2l_lstm", None)
    answer = time_machine.main([*arguments, *SMALL])
    assert "--compare-d2l needs d2l" in answer
    assert 'pip install -e ".[examples,d2l]"' in answer
    monkeypatch.setattr(time_machine, "BACKEND", "jax")
    with pytest.raises(time_machine.ArgumentError, match="and this is jax"):
        time_machine.import_d2l()
    assert not out.exists()


# --- as a process ------------------------------------------------------------


def test_ctrl_c_ends_with_a_report(own_text, out):
    own_text.write_text("abcdefgh" * 200)
    arguments = ["--own-text", str(own_text), "--out", str(out), *SMALL]
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, *arguments, "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    progress = ""
    while "tokens/s" not in progress:  # the first epochs are over
        progress += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    printed, rest = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in rest
    (run,), history = read(out)
    assert run["cell"] == "scratch"
    assert 1 <= run["epochs"] == len(history) < 100_000
    assert f"Interrupted after {run['epochs']} finished epochs." in rest
    assert re.search(r"^scratch: perplexity ", printed, re.MULTILINE)
