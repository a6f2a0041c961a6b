"""Each bad call of the tables beside this file gives the error that stands below it.

A table has calls at the margin and errors indented; `#` begins a comment, and a
message is cut at `…` where the rest is Keras's or the system's to choose. What the
calls use is in `names`.
"""

import builtins
import os
import re
from math import inf, nan
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_scratch_lstm
from keras_scratch_lstm import (
    GateTrace,
    ScratchLSTM,
    ScratchLSTMCell,
    from_torch,
    to_torch,
)
from keras_scratch_lstm.tracing.trace import ARRAYS

TABLES = sorted(Path(__file__).parent.glob("*.txt"))


def cases():
    for table in TABLES:
        lines = [
            line
            for line in table.read_text("utf-8").splitlines()
            if line and not line.startswith("#")
        ]
        for call, error in zip(lines[::2], lines[1::2], strict=True):
            assert not call.startswith(" "), call
            assert error.startswith("    "), call
            yield pytest.param(table.stem, call, error.strip(), id=call)


CASES = list(cases())
NEEDS = {"trace.to_dataframe": "pandas", "trace.to_html": "jinja2"}


class SubLSTM(layers.LSTM):
    pass


class Peephole(ScratchLSTMCell):
    def gates(self, x, h, c):
        return super().gates(x, h + c, c)


def built(layer, shape=(3, 7, 5)):
    layer.build(shape)
    return layer


def make_model():
    model = keras.Sequential(
        [
            keras.Input((7,), dtype="int32"),
            layers.Embedding(9, 5, name="embedding"),
            layers.LSTM(6, return_sequences=True, name="lower"),
            ScratchLSTM(6, name="upper"),
        ],
        name="model",
    )
    model.compile("sgd", "mse")
    return model


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the calls of the tables are made of."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "notes.txt").write_text("no trace at all")
    os.mkfifo(folder / "pipe")
    h, f = np.zeros((3, 6), "float32"), np.full((2, 3, 4), 0.5, "float32")
    tokens = np.ones((3, 7), "int32")
    model = make_model()
    cell = built(ScratchLSTMCell(6, name="one"), (3, 5))
    layer = built(ScratchLSTM(6, name="one"))

    def new_trace(**changes):
        return GateTrace(**dict.fromkeys(ARRAYS, f) | changes)

    names = {
        name: getattr(keras_scratch_lstm, name) for name in keras_scratch_lstm.__all__
    }
    names |= {
        "inf": inf,
        "nan": nan,
        "np": np,
        "keras": keras,
        "layers": layers,
        "SubLSTM": SubLSTM,
        "Peephole": Peephole,
        "built": built,
        "from_torch": from_torch,
        "to_torch": to_torch,
        "x": np.zeros((3, 7, 5), "float32"),
        "h": h,
        "c": h,
        "f": f,
        "tokens": tokens,
        "y_true": np.ones((2, 3), "int32"),
        "y_pred": np.zeros((2, 3, 4), "float32"),
        "cell": cell,
        "layer": layer,
        "stateful": built(ScratchLSTM(6, name="one", stateful=True)),
        "weights": cell.get_weights(),
        "model": model,
        "fit": lambda callback: model.fit(
            tokens, np.zeros((3, 6)), callbacks=[callback], verbose=0
        ),
        "cell_config": cell.get_config(),
        "layer_config": layer.get_config(),
        "torch_weights": {
            "weight_ih_l0": np.zeros((16, 5)),
            "weight_hh_l0": np.zeros((16, 4)),
        },
        "trace": new_trace(),
        "new_trace": new_trace,
        "folder": folder,
        "pipe": folder / "pipe",
        "text_file": folder / "notes.txt",
    }
    return names


def sentence_of(error):
    """What an error says, without the lines that Keras puts around it."""
    message = str(error)
    if "\x1b[1m" in message:
        message = message.split("\x1b[1m")[1].split("\x1b[0m")[0]
    return message


def test_there_are_many():
    calls = [case.values[1] for case in CASES]
    assert len(set(calls)) == len(calls)


def test_our_sentences_say_what_is_expected():
    """All but those of Python and Keras, which the tables cut short or name."""
    theirs = re.compile(r"…$|^TypeError: |Unrecognized keyword|Invalid dtype")
    for case in CASES:
        call, error = case.values[1:]
        if not theirs.search(error):
            assert re.fullmatch(r"ValueError: .*`[^`]+`.*; expected .*\.", error), call


@pytest.mark.parametrize(("table", "call", "expected"), CASES)
def test_the_call_gives_the_error(table, call, expected, names):
    if table == "plotting":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        from keras_scratch_lstm import plotting

        names = names | {"plotting": plotting}
    for package in ("pandas", "jinja2"):
        if package in NEEDS.get(call.split("(")[0], ""):
            pytest.importorskip(package, reason=f"{package} is not installed")
    kind, _, message = expected.partition(": ")
    kind = getattr(builtins, kind)
    with pytest.raises(kind) as error:
        eval(call, dict(names))
    assert type(error.value) is kind
    said = sentence_of(error.value).replace(str(names["folder"]), "{folder}")
    if message.endswith("…"):
        said = said[: len(message) - 1] + "…"
    assert said == message
