"""The cells of the documentation against those of TensorFlow Addons."""

import math
from pathlib import Path

import keras
import numpy as np
import pytest
from test_docs import ROOT, blocks

from keras_scratch_lstm import trace_gates

ADDONS = Path(__file__).with_name("addons.npz")  # of make_addons.py


@pytest.fixture(scope="module")
def documented():
    """What the pages define."""
    names = {"__name__": "documented"}
    for page, count in ("own-gates", 2), ("from-addons", 3):
        for block in blocks(ROOT / "docs" / f"{page}.md")[:count]:
            exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("PeepholeCell", "PeepholeLSTMCell"), ("LayerNormCell", "LayerNormLSTMCell")],
)
def test_the_cell_with_the_weights_of(documented, tmp_path, name, theirs):
    with np.load(ADDONS) as file:
        arrays = {key: file[key] for key in file}
    x, outputs = arrays["x"], arrays[f"{theirs}/outputs"]
    keys = [key for key in arrays if key.startswith(theirs) and key[-1].isdecimal()]

    rnn = keras.layers.RNN(documented[name](5), return_sequences=True)
    model = keras.Sequential([keras.Input((6, 3)), rnn])
    documented["take_weights"](rnn.cell, [arrays[key] for key in keys])
    taken = sum(math.prod(weight.shape) for weight in rnn.weights)
    assert taken == sum(arrays[key].size for key in keys)
    np.testing.assert_allclose(model.predict(x, verbose=0), outputs, atol=1e-6)

    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    trace = trace_gates(again, x)
    np.testing.assert_allclose(trace.h, outputs, atol=1e-6)
    np.testing.assert_allclose(trace.o * np.tanh(trace.c), outputs, atol=1e-6)
