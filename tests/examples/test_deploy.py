import re
import shutil
import subprocess

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("exports on TensorFlow", allow_module_level=True)
pytest.importorskip("ai_edge_litert")

import deploy

PRINT = """
#include <cstdio>
#include "model_data.h"
int main() { fwrite(model_data, 1, model_data_size, stdout); }
"""
pytestmark = [pytest.mark.one_backend, pytest.mark.slow]


def test_files_run_and_quantized_ones_are_smaller(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    deploy.main(["--epochs", "4", "--out", str(tmp_path)])
    pattern = r" *(\S+): (\S+) kB, \d+ µs, largest difference (\S+), accuracy (\S+)%"
    lines = re.findall(pattern, capsys.readouterr().out)
    size, difference, accuracy = (
        {name: float(value[k]) for name, *value in lines} for k in range(3)
    )
    float32, int8 = "float32.tflite", "int8.tflite"
    names = [float32, "float16.tflite", "dynamic.tflite", int8, "model.onnx"]
    assert list(size) == names
    assert size[int8] < size["dynamic.tflite"] < size["float16.tflite"] < size[float32]
    assert difference[float32] < 1e-4 > difference["model.onnx"]
    assert difference[float32] < difference["float16.tflite"] < 2e-3
    assert difference[float32] < difference[int8] < 0.05 > difference["dynamic.tflite"]
    assert all(abs(value - accuracy[float32]) <= 5 for value in accuracy.values())
    assert accuracy[float32] > 50  # chance is 25
    calls = (tmp_path / "ops.txt").read_text().splitlines()
    assert calls[0] == f"MicroMutableOpResolver<{len(calls) - 1}> resolver;"
    assert "resolver.AddUnidirectionalSequenceLSTM();" in calls
    if shutil.which("g++"):
        (tmp_path / "print.cc").write_text(PRINT)
        command = ["g++", "-Wall", "-Werror", "print.cc", "model_data.cc"]
        subprocess.run([*command, "-o", "print"], cwd=tmp_path, check=True)
        printed = subprocess.check_output(tmp_path / "print")
        assert printed == (tmp_path / int8).read_bytes()
