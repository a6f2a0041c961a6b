import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("jinja2", reason="Jinja2 is not installed")

import look_inside
from PIL import Image

from keras_scratch_lstm import GateTrace, ScratchLSTMCell, trace_gates

EXAMPLE = Path(look_inside.__file__)
SMALL = ["--units", "6", "--epochs", "1", "--characters", "150"]
PICTURES = ["gates.png", "heatmap.png", "saturation.png", "text.png"]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))


@pytest.fixture
def own_text(tmp_path, rng):
    path = tmp_path / "own.txt"
    path.write_text("".join(rng.choice(list('aeB, 1"\n'), 2000)))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "here"


def run(*arguments):
    return look_inside.main([str(argument) for argument in arguments])


def assert_looked(out, printed, characters, units=6):
    trace = GateTrace.load(out / "trace.npz")
    assert trace.f.shape == (1, len(characters), units)
    for name in PICTURES:
        with Image.open(out / name) as picture:
            assert picture.width > 900
    assert "Gates of" in (out / "gates.html").read_text("utf-8")
    lines = re.findall(r"^unit (\d+): .* follows (.*) \(r = (.*)\)$", printed, re.M)
    assert len(lines) == 5
    classes = look_inside.classes_of(characters)
    for unit, what, r in lines:
        expected = np.corrcoef(trace.c[0, :, int(unit)], classes[what])[0, 1]
        assert float(r) == pytest.approx(expected, abs=0.006)
    strengths = [abs(float(r)) for _, _, r in lines]
    assert strengths == sorted(strengths, reverse=True)
    return trace


def test_it_trains_a_model_and_looks_inside(own_text, out, capsys):
    assert run("--text", own_text, "--out", out, *SMALL) == 0
    printed = capsys.readouterr().out
    text = own_text.read_text()
    trace = assert_looked(out, printed, text[:150])
    # The model that it leaves behind is the one that was looked into.
    again = out / "again"
    assert run(out / "model.keras", "--text", own_text, "--out", again, *SMALL) == 0
    same = assert_looked(again, capsys.readouterr().out, text[:150])
    np.testing.assert_allclose(same.c, trace.c, rtol=1e-5, atol=1e-6)
    model = keras.saving.load_model(out / "model.keras")
    vocabulary = look_inside.Vocabulary(text)
    assert model.layers[0].input_dim == len(vocabulary)
    direct = trace_gates(model, vocabulary.encode(text)[None, :150])
    np.testing.assert_allclose(trace.h, direct.h, rtol=1e-5, atol=1e-6)


def test_a_model_for_minibatches_of_one_shape(own_text, out, capsys):
    """As `time_machine.py` leaves it: stateful, and in the book's vocabulary."""
    characters = look_inside.tokenize(own_text.read_text())
    size = len(look_inside.Vocabulary(characters))
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(4, 5), dtype="int32"),
            keras.layers.Embedding(
                size, size, embeddings_initializer="identity", name="one_hot"
            ),
            keras.layers.RNN(
                ScratchLSTMCell(6), return_sequences=True, stateful=True, name="rnn"
            ),
            keras.layers.Dense(size, name="logits"),
        ]
    )
    path = out.parent.parent / "scratch.keras"
    model.save(path)
    assert run(path, "--text", own_text, "--out", out, *SMALL) == 0
    trace = assert_looked(out, capsys.readouterr().out, characters[:150])
    assert trace.layer == "rnn"
    cell, tokens = model.layers[1].cell, look_inside.Vocabulary(characters)
    states = cell.get_initial_state(1)
    for step, token in enumerate(tokens.encode(characters[:10])):
        h, states = cell(model.layers[0](np.array([token])), states)
        h = keras.ops.convert_to_numpy(h)[0]
        np.testing.assert_allclose(trace.h[0, step], h, rtol=1e-4, atol=1e-5)


def test_what_there_is_to_follow():
    text = 'A "few|Owls", 12.'
    flags = {
        "spaces": "01000010000001000",
        "starts of words": "10100001000000100",
        "vowels": "10001001000000000",
        "capitals": "10000001000000000",
        "digits": "00000000000000110",
        "punctuation": "00100000000110001",
        "quotations": "00111111111000000",
        "the place in the word": "10123401234560123",
        "the place in the line": "01234560123456789",
    }
    found = look_inside.classes_of(text.replace("|", "\n"))
    assert set(found) == set(flags)
    for what, expected in flags.items():
        assert "".join(str(int(x) % 10) for x in found[what]) == expected, what


def test_a_unit_that_follows_something_is_found(rng):
    text = "".join(rng.choice(list("ab e\n"), 400))
    classes = look_inside.classes_of(text)
    values = rng.normal(size=(400, 8))
    values[:, 3] = 1 - 2 * classes["vowels"]
    values[:, 6] = classes["spaces"] + rng.normal(scale=0.3, size=400)
    values[:, 0] = 0.25
    first, second, *rest = look_inside.find_selective(values, classes)
    assert first == (3, "vowels", pytest.approx(-1))
    assert second[:2] == (6, "spaces")
    assert len(rest) == 3
    assert all(abs(one.r) < 0.5 and one.unit != 0 for one in rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--units", "0"], "argument --units: '0' came; expected a positive integer"),
        (["--epochs", "x"], "argument --epochs: 'x' came; expected a positive integer"),
        (["--characters", "-1"], "argument --characters: '-1' came; expected"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, message, out, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*arguments, "--out", out)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("look_inside.py: error: ")
    assert message in line
    assert not out.exists()


def refused(message, *arguments):
    answer = run(*arguments)
    assert re.match(r"look_inside\.py: error: [^\n]*$", answer)
    assert re.search(message, answer), answer


def test_what_cannot_be_met(tmp_path, own_text, out):
    small = ["--text", own_text, "--out", out, *SMALL]
    refused("cannot be loaded: File not found", tmp_path / "none.keras", *small)
    refused("none.txt cannot be read", "--text", tmp_path / "none.txt", "--out", out)
    (tmp_path / "broken.keras").write_bytes(b"no model")
    refused("broken.keras cannot be loaded", tmp_path / "broken.keras", *small)
    refused("--out .* cannot be written", "--out", own_text / "below")

    def save(*layers, shape=(None,)):
        model = keras.Sequential([keras.Input(shape, dtype="int32"), *layers])
        model.save(tmp_path / "model.keras")
        return tmp_path / "model.keras"

    dense = save(keras.layers.Dense(2), shape=(None, 3))
    refused("begins with a Dense layer; expected an Embedding", dense, *small)
    other = save(keras.layers.Embedding(99, 2), keras.layers.LSTM(2))
    refused("the model knows 99 tokens, and .*own.txt has", other, *small)
    size = len(look_inside.Vocabulary(own_text.read_text()))
    gru = save(keras.layers.Embedding(size, 2), keras.layers.GRU(2))
    refused("which has no LSTM; expected", gru, *small)
    stack = [keras.layers.LSTM(2, return_sequences=True, name=name) for name in "ab"]
    refused(
        "has 2 LSTMs; expected one of 'a', 'b'",
        save(keras.layers.Embedding(size, 2), *stack),
        *small,
    )
    refused(
        r"takes inputs of shape \(None, 5\) alone, and has 2 recurrent layers",
        save(keras.layers.Embedding(size, 2), *stack, shape=(5,)),
        *small,
    )


@pytest.mark.one_backend
def test_as_a_script(own_text, out):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--text", own_text, "--out", out, *SMALL],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the memory follows") == 5
