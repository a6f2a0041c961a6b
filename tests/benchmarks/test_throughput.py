"""The benchmark runs and reports its measurements. No test asserts a time."""

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytestmark = [pytest.mark.one_backend, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"
BACKEND = keras.backend.backend()
TINY = {"rounds": 2, "batches": 2, "batch": 2, "time": 4, "units": 3, "characters": 20}
TINY |= {"grid-batches": "1,2", "grid-units": "2,3", "step-counts": "2,5"}


@pytest.fixture(scope="module")
def throughput():
    spec = importlib.util.spec_from_file_location("throughput", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    """Runs the benchmark; returns the measurements of a table."""

    def run(table, *arguments):
        command = [sys.executable, SCRIPT, "--backend", BACKEND, "--out", tmp_path]
        command += [f"--{name}={value}" for name, value in TINY.items()]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (tmp_path / "printed").write_text(done.stdout)
        return json.loads((tmp_path / f"{table}.json").read_text())[BACKEND]

    return run


def test_main_table(run, throughput, tmp_path):
    pytest.importorskip("matplotlib")
    found = run("main")
    names = {"RNN(LSTMCell)", "LSTM", "RNN(ScratchLSTMCell)", "ScratchLSTM"}
    assert names <= set(found["tokens_per_sec"]) == set(throughput.contenders(BACKEND))
    for name, speed in found["tokens_per_sec"].items():
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert speed["first_call_s"] > 0
        row = f"| `{name}` | {speed['median']:,.0f} ("
        assert row in (tmp_path / "printed").read_text()
    assert "`ScratchLSTM` / `LSTM`" in found["ratios"]
    for extension in ("png", "svg"):
        assert (tmp_path / f"throughput.{extension}").stat().st_size > 1000


def test_other_tables(run):
    grid = run("grid", "--grid")
    sizes = [(one["batch"], one["units"]) for one in grid["cells"]]
    assert sizes == [(1, 2), (1, 3), (2, 2), (2, 3)]
    ratios = [one["ratio"] for one in grid["cells"]]
    assert grid["min"] == min(ratios)
    assert grid["geometric_mean"] == pytest.approx(statistics.geometric_mean(ratios))
    lengths = run("steps", "--steps")["lengths"]
    assert [one["steps"] for one in lengths] == [2, 5]
    inference = run("inference", "--inference")
    assert inference["generation_ratio"] > 0
    assert len(inference["characters_per_sec"]) == 2


def test_generators_return_same_text(throughput):
    import numpy as np

    compiled, by_predict = throughput.generators(units=16, characters=30)
    start = np.array([[1]], "int32")
    found = compiled(start)
    np.testing.assert_array_equal(found, by_predict(start))
    assert len(found) == 30


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "a"])
@pytest.mark.parametrize("argument", ["rounds", "grid-units"])
def test_invalid_number_is_rejected(throughput, capsys, argument, wrong):
    with pytest.raises(SystemExit):
        throughput.parse([f"--{argument}={wrong}"])
    expected = f"--{argument}: must be a positive integer. Received: '{wrong}'\n"
    assert capsys.readouterr().err.endswith(expected)


def test_ratios_are_medians_over_rounds(throughput):
    times = {"ScratchLSTM": [1.0, 2.0, 4.0], "LSTM": [3.0, 4.0, 4.0]}
    assert throughput.ratios(times) == {"`ScratchLSTM` / `LSTM`": 2.0}


def test_flop_per_token(throughput):
    units, vocabulary = 256, 28
    x_W_x, h_W_h, logits = units * vocabulary, units * units, units * vocabulary
    forward = 4 * (x_W_x + h_W_h) + logits
    backward = forward + 4 * h_W_h + logits  # to the weights, and to the inputs
    assert throughput.flop_per_token(units) == 2 * (forward + backward)


def test_rounds_are_interleaved(throughput):
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    times = throughput.interleave(functions, 3)
    assert "".join(called) == "abcbcacab"
    assert [len(values) for values in times.values()] == [3, 3, 3]
