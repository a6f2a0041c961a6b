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
    def run(*arguments):
        command = [sys.executable, SCRIPT, "--backend", BACKEND, "--out", tmp_path]
        command += [f"--{name}={value}" for name, value in TINY.items()]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, tmp_path

    return run


def test_main_table(run, throughput):
    pytest.importorskip("matplotlib")
    printed, out = run()
    found = json.loads((out / "main.json").read_text())[BACKEND]
    names = {"RNN(LSTMCell)", "LSTM", "RNN(ScratchLSTMCell)", "ScratchLSTM"}
    assert names <= set(found["tokens_per_sec"]) == set(throughput.contenders(BACKEND))
    for name, speed in found["tokens_per_sec"].items():
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert speed["first_call_s"] > 0
        assert f"| `{name}` | {speed['median']:,.0f} (" in printed
    assert "`ScratchLSTM` / `LSTM`" in found["ratios"]
    for extension in ("png", "svg"):
        assert (out / f"throughput.{extension}").stat().st_size > 1000


def test_grid(run):
    _, out = run("--grid")
    found = json.loads((out / "grid.json").read_text())[BACKEND]
    sizes = [(one["batch"], one["units"]) for one in found["cells"]]
    assert sizes == [(1, 2), (1, 3), (2, 2), (2, 3)]
    ratios = [one["ratio"] for one in found["cells"]]
    assert found["min"] == min(ratios)
    assert found["geometric_mean"] == pytest.approx(statistics.geometric_mean(ratios))


def test_long_sequences(run):
    _, out = run("--steps")
    found = json.loads((out / "steps.json").read_text())[BACKEND]
    assert [one["steps"] for one in found["lengths"]] == [2, 5]


def test_inference(run):
    _, out = run("--inference")
    found = json.loads((out / "inference.json").read_text())[BACKEND]
    assert found["generation_ratio"] > 0
    assert len(found["characters_per_sec"]) == 2


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
    to_weights, to_inputs = forward, 4 * h_W_h + logits
    assert throughput.flop_per_token(units) == 2 * (forward + to_weights + to_inputs)


def test_rounds_are_interleaved(throughput):
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    times = throughput.interleave(functions, 3)
    assert "".join(called) == "abcbcacab"
    assert [len(values) for values in times.values()] == [3, 3, 3]
