import re

import keras
import look_inside
import numpy as np
import pytest
from helpers.book_text import Vocabulary, tokenize
from PIL import Image
from time_machine import build_model

from keras_scratch_lstm import GateTrace, ScratchLSTMCell, trace_gates
from keras_scratch_lstm.tracing.tokens import token_features

SMALL = ["--units", "6", "--epochs", "1", "--characters", "150"]


def run(*arguments):
    return look_inside.main([str(argument) for argument in arguments])


def assert_report(out, printed, characters, units=6):
    """Checks files, and the printed correlations against NumPy's."""
    trace = GateTrace.load(out / "trace.npz")
    assert trace.f.shape == (1, len(characters), units)
    for name in ("gates.png", "heatmap.png", "saturation.png", "text.png"):
        with Image.open(out / name) as image:
            assert image.width > 900
    assert "</html>" in (out / "gates.html").read_text("utf-8")
    c = trace.c[0].astype("float64").T
    correlations = {
        name: [np.corrcoef(unit, values)[0, 1] for unit in c]
        for name, values in token_features(characters).items()
    }
    strongest = np.abs([*correlations.values()]).max(axis=0)
    pattern = r"^unit (\d+): c correlates with (.*) \(r = (.*)\)$"
    lines = re.findall(pattern, printed, re.M)
    expected = sorted(strongest, reverse=True)[:5]
    for (unit, name, r), absolute in zip(lines, expected, strict=True):
        assert float(r) == pytest.approx(correlations[name][int(unit)], abs=0.006)
        assert abs(float(r)) == pytest.approx(absolute, abs=0.006)
    return trace


@pytest.mark.slow
def test_trained_model_and_its_report(text, out, capsys):
    assert run("--text", text, "--out", out, *SMALL) == 0
    characters = text.read_text()
    trace = assert_report(out, capsys.readouterr().out, characters[:150])
    model = keras.saving.load_model(out / "model.keras")
    tokens = Vocabulary(characters).encode(characters)[None, :150]
    np.testing.assert_allclose(trace.h, trace_gates(model, tokens).h, atol=1e-5)


def test_stateful_model_of_time_machine(text, out, capsys):
    """A model with a fixed batch shape, stateful, on lowercase letters."""
    characters = tokenize(text.read_text())
    vocabulary = Vocabulary(characters)
    layer = keras.layers.RNN(
        ScratchLSTMCell(6), return_sequences=True, stateful=True, name="rnn"
    )
    model = build_model(layer, len(vocabulary), 4, 5)
    path = text.with_name("model.keras")
    model.save(path)
    assert run(path, "--text", text, "--out", out, *SMALL) == 0
    trace = assert_report(out, capsys.readouterr().out, characters[:150])
    states = layer.cell.get_initial_state(1)
    for step, token in enumerate(vocabulary.encode(characters[:10])):
        h, states = layer.cell(model.layers[0](np.array([token])), states)
        h = keras.ops.convert_to_numpy(h)[0]
        np.testing.assert_allclose(trace.h[0, step], h, rtol=1e-4, atol=1e-5)


def save(path, *layers):
    model = keras.Sequential([keras.Input((None,), dtype="int32"), *layers])
    model.save(path)
    return path


def test_unusable_models_and_texts(tmp_path, text, out):
    size = len(Vocabulary(text.read_text()))
    embedding = keras.layers.Embedding
    stack = [keras.layers.LSTM(2, return_sequences=True, name=name) for name in "ab"]
    (tmp_path / "broken.keras").write_bytes(b"no model")
    models = {
        "none.keras": "File not found",
        "broken.keras": "",
        save(tmp_path / "other.keras", embedding(99, 2), keras.layers.LSTM(2)): (
            "must start with an Embedding of .*own.txt.* Received: 99 tokens"
        ),
        save(tmp_path / "stack.keras", embedding(size, 2), *stack): "'a', 'b'",
    }
    for model, message in models.items():
        answer = run(tmp_path / model, "--text", text, "--out", out, *SMALL)
        assert re.match(r"look_inside\.py: error: [^\n]+$", answer)
        assert re.search(message, answer), answer
