"""The command `keras-scratch-lstm convert`."""

import copy
import subprocess
import sys
import zipfile

import keras
import pytest
from keras2_files import KERAS_2_1, assert_predicts_as_recorded, write_keras_2_1

from keras_scratch_lstm import trace_gates
from keras_scratch_lstm.__main__ import main

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("hard", "h5"),
        ("cudnn", "h5"),
        ("sentiment", "h5"),
        ("masked_decoders", "keras"),
    ],
)
def test_converted_models_predict_as_in_keras2(
    files, tmp_path, capsys, name, extension
):
    old, new = files / f"{name}.{extension}", tmp_path / "new.keras"
    assert main(["convert", str(old), str(new)]) == 0
    output = capsys.readouterr().out
    assert ("CuDNNGRU -> GRU" in output) == (name == "cudnn")
    assert ("Scaled by 1.2" in output) == (name == "hard")
    assert_predicts_as_recorded(keras.saving.load_model(new), files, name)
    with zipfile.ZipFile(new) as archive:
        assert b"keras_scratch_lstm" not in archive.read("config.json")
    assert list(tmp_path.iterdir()) == [new]


def test_gates_of_the_converted_model_are_the_same(files, tmp_path, draw):
    new, x = tmp_path / "new.keras", draw(2, 6, 4)
    arguments = [str(files / "stock.json"), str(new)]
    assert main(["convert", *arguments, "--weights", f"{files}/stock.weights.h5"]) == 0
    one, other = (trace_gates(path, x, layer=0) for path in (files / "stock.h5", new))
    for name in "ifoch":
        assert abs(getattr(one, name) - getattr(other, name)).max() < 1e-6


def test_info_describes_a_file(files, tmp_path, capsys):
    assert main(["convert", str(files / "stock.h5"), "--info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Keras 2.")
    assert "  lstm: LSTM, (None, 6, 5), 200 weights" in lines
    assert lines[-1] == "Weights: 312"


def test_errors_have_one_line(tmp_path, rng, capsys):
    page, new = tmp_path / "page.h5", tmp_path / "new.keras"
    page.write_bytes(b"<!DOCTYPE html>")
    config = copy.deepcopy(KERAS_2_1)
    config["config"][0]["config"]["activation"] = "hard_sigmoid"
    write_keras_2_1(tmp_path / "hard.h5", rng, config)
    for name, message in {
        "none.h5": "No such file or directory",
        "page.h5": "it is a web page",
        "hard.h5": "layer 'lstm_1': `activation='hard_sigmoid'`, which is also",
    }.items():
        assert main(["convert", str(tmp_path / name), str(new)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("error: ")
        assert message in error
    assert not new.exists()
    for arguments in (["a.h5"], ["a.h5", "b.keras", "--info"], ["a.h5", "b.h5"]):
        with pytest.raises(SystemExit) as error:
            main(["convert", *arguments])
        assert error.value.code == 2


SCRIPT = """
import sys; sys.argv[0] = "/usr/bin/keras-scratch-lstm"
from keras_scratch_lstm.__main__ import main; sys.exit(main())
"""


@pytest.mark.parametrize("command", [["-m", "keras_scratch_lstm"], ["-c", SCRIPT]])
def test_help_does_not_wait_for_keras(command):
    command = [sys.executable, "-X", "importtime", *command, "convert", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--weights" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"keras", "numpy", "tensorflow"})
