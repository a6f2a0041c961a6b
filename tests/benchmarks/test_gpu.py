"""The script for a GPU, on the CPU. No test asserts a time."""

import json
from pathlib import Path

import keras
import pytest
from reference import run_python

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
BACKEND = keras.backend.backend()


@pytest.mark.slow
@pytest.mark.one_backend
def test_dry_run(tmp_path):
    (tmp_path / "gpu.json").write_text('{"other": 1}')
    run_python(SCRIPT, "--dry-run", "--backend", BACKEND, "--out", tmp_path)
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["other"] == 1
    found = results[BACKEND]
    assert len(found["parity"]) == 11
    for differences in found["parity"].values():
        limit = differences.pop("limit")
        assert max(differences.values()) <= limit
    assert len(found["ratios"]) == 5
    for ratios in found["ratios"].values():
        assert min(ratios.values()) > 0
