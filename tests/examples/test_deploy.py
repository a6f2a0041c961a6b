import re

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("exports on TensorFlow", allow_module_level=True)
pytest.importorskip("keras.src.export.litert", reason="Keras 3.13 or newer")
pytest.importorskip("ai_edge_litert")

import deploy

pytestmark = [pytest.mark.one_backend, pytest.mark.slow]


def test_files_run_and_quantized_ones_are_smaller(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch")
    deploy.main(["--epochs", "8", "--out", str(tmp_path)])
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
    assert difference[int8] > difference[float32]
    assert all(abs(value - accuracy[float32]) <= 5 for value in accuracy.values())
    assert accuracy[float32] > 50  # chance is 25
