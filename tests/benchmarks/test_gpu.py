"""The script for a GPU, on the CPU. No test asserts a time."""

import importlib
import json
from pathlib import Path

import keras
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BACKEND = keras.backend.backend()
OPTIONS = {"padding": "gaps", "bidirectional": True, "tf32": True, "jit_compile": False}
PARITY = {
    "most options": (OPTIONS, 1e-3),
    "the others": ({"stateful": True, "policy": "mixed_float16"}, 5e-2),
}


@pytest.mark.slow
@pytest.mark.one_backend
def test_dry_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    gpu = importlib.import_module("gpu")
    every = {option for options, _ in gpu.PARITY.values() for option in options}
    assert {option for options, _ in PARITY.values() for option in options} == every
    monkeypatch.setattr(gpu, "PARITY", PARITY)
    (tmp_path / "gpu.json").write_text('{"other": 1}')
    gpu.run(BACKEND, gpu.parse(["--dry-run", "--out", str(tmp_path)]))
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["other"] == 1
    found = results[BACKEND]
    assert len(found["parity"]) == 2
    for differences in found["parity"].values():
        limit = differences.pop("limit")
        assert max(differences.values()) <= limit
    assert len(found["ratios"]) == 5
    assert len(found["ratios"]["cells / `ScratchLSTM`"]) == 5
    assert list(found["ratios"]["padded"]) == ["`ScratchLSTM` / `LSTM`"]
    for ratios in found["ratios"].values():
        assert min(ratios.values()) > 0
