"""The script for a GPU, on the CPU. No test asserts a time."""

import importlib
import json
from pathlib import Path

import keras
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BACKEND = keras.backend.backend()
OPTIONS = {"padding": "gaps", "bidirectional": True, "tf32": True, "jit_compile": False}
OPTIONS |= {"stateful": True, "policy": "mixed_float16"}


@pytest.mark.slow
@pytest.mark.one_backend
def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    gpu = importlib.import_module("gpu")
    every = {option for options, _ in gpu.PARITY.values() for option in options}
    assert {*OPTIONS} == every
    monkeypatch.setattr(gpu, "PARITY", {"all options": (OPTIONS, 5e-2)})
    (tmp_path / "gpu.json").write_text('{"other": 1}')
    gpu.run(BACKEND, gpu.parse(["--dry-run", "--out", str(tmp_path)]))
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["other"] == 1
    found = results[BACKEND]
    differences = found["parity"]["all options"]
    assert 0 < max(differences["loss"], differences["update"]) <= differences["limit"]
    assert len(found["ratios"]) == 5
    assert len(found["ratios"]["cells / `ScratchLSTM`"]) == 5
    assert list(found["ratios"]["padded"]) == ["`ScratchLSTM` / `LSTM`"]
    for ratios in found["ratios"].values():
        assert min(ratios.values()) > 0
