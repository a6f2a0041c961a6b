"""Comparison of the documented custom cells with those of TensorFlow Addons."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from test_docs import ROOT, blocks

from keras_scratch_lstm import trace_gates

ADDONS = Path(__file__).with_name("addons.npz")  # written by make_addons.py
DEFINITIONS = r"^(class (Peephole|LayerNorm)Cell\(|def \w+_weights\(cell, weights\))"


@pytest.fixture(scope="module")
def documented():
    """The names that the pages define, up to the last definition of each page."""
    names = {"__name__": "documented"}
    for page in sorted((ROOT / "docs").glob("*.md")):
        code = blocks(page)
        found = [
            k for k, block in enumerate(code) if re.search(DEFINITIONS, block, re.M)
        ]
        for block in code[: max(found, default=-1) + 1]:
            exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("name", ["Peephole", "LayerNorm"])
def test_documented_cell_matches_addons(documented, tmp_path, name):
    with np.load(ADDONS) as file:
        prefix = f"{name}LSTMCell/"
        x, outputs = file["x"], file[f"{prefix}outputs"]
        weights = [file[key] for key in file if re.match(prefix + r"\d", key)]

    rnn = keras.layers.RNN(documented[f"{name}Cell"](5), return_sequences=True)
    model = keras.Sequential([keras.Input((6, 3)), rnn])
    load = next(key for key in documented if key.endswith("_weights"))
    documented[load](rnn.cell, weights)
    assert rnn.count_params() == sum(weight.size for weight in weights)
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-6)

    model.save(tmp_path / "model.keras")
    trace = trace_gates(keras.saving.load_model(tmp_path / "model.keras"), x)
    np.testing.assert_allclose(trace.h, outputs, atol=1e-6)
    np.testing.assert_allclose(trace.o * np.tanh(trace.c), outputs, atol=1e-6)
