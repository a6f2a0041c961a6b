"""The benchmark runs and reports its measurements. No test asserts a time."""

import importlib
import json
from pathlib import Path

import keras
import pytest
from reference import run_python

pytestmark = [pytest.mark.one_backend, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"
BACKEND = keras.backend.backend()
TINY = {"rounds": 2, "batches": 2, "batch": 2, "time": 4, "units": 3, "characters": 20}
TINY["step-counts"] = "5"


@pytest.fixture(scope="module")
def throughput():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("throughput")


def test_quick_table_and_plot(throughput, tmp_path):
    pytest.importorskip("matplotlib")
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    command = [SCRIPT, "--backend", BACKEND, "--out", tmp_path, *sizes, "--quick"]
    printed = run_python(*command)
    found = json.loads((tmp_path / "quick.json").read_text())[BACKEND]
    names = {"RNN(LSTMCell)", "LSTM", "RNN(ScratchLSTMCell)", "ScratchLSTM"}
    assert names <= set(found["tokens_per_sec"]) == set(throughput.contenders(BACKEND))
    for name, speed in found["tokens_per_sec"].items():
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert f"| `{name}` | {speed['median']:,.0f} (" in printed
    assert "`ScratchLSTM` / `LSTM`" in found["ratios"]
    assert "one time step)" in printed.splitlines()[0]  # the rate of its matmul
    assert (tmp_path / "quick.md").read_text() == printed
    throughput.draw({BACKEND: found}, tmp_path)
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_other_tables(throughput, monkeypatch):
    """Those of `--cells` and `--padded` are in `test_gpu.py`."""
    run, alone = throughput.run_process, []

    def run_once(*arguments):  # A process for one of the layers shows enough.
        alone.extend([] if alone else [run(*arguments)])
        return alone[0]

    monkeypatch.setattr(throughput, "run_process", run_once)
    monkeypatch.setattr(throughput, "SMALL", [(3, 2, 2)])
    tables = {}
    for name in ("steps", "inference", "small"):
        sizes = [f"--{key}={value}" for key, value in TINY.items()]
        options = throughput.parse([*sizes, f"--{name}"])
        tables[name] = throughput.MEASURES[name](BACKEND, options)
    (steps,) = tables["steps"]["lengths"]
    assert steps["steps"] == 5
    assert steps["ms_per_step_ScratchLSTM"] > 0
    assert tables["inference"]["generation_ratio"] > 0
    for model in tables["small"]["models"]:
        pairs = ["`ScratchLSTM` / `LSTM`", "`Bidirectional` of each"]
        assert list(model["ratios"]) == pairs
        assert min(model["ratios"].values()) > 0


@pytest.mark.parametrize("wrong", ["0", "1.5"])
def test_invalid_number_is_rejected(throughput, capsys, wrong):
    with pytest.raises(SystemExit):
        throughput.parse([f"--rounds={wrong}"])
    expected = f"--rounds: must be a positive integer. Received: '{wrong}'\n"
    assert capsys.readouterr().err.endswith(expected)


def test_flop_per_token(throughput):
    units, vocabulary = 256, 28
    x_W_x, h_W_h, logits = units * vocabulary, units * units, units * vocabulary
    forward = 4 * (x_W_x + h_W_h) + logits
    to_weights, to_inputs = forward, 4 * h_W_h + logits
    assert throughput.flop_per_token(units) == 2 * (forward + to_weights + to_inputs)
