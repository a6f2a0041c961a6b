"""The benchmark runs and reports its measurements. No test asserts a time."""

import importlib
import json
import statistics
from pathlib import Path

import keras
import pytest
from reference import run_python

pytestmark = [pytest.mark.one_backend, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"
BACKEND = keras.backend.backend()
TINY = {"rounds": 2, "batches": 2, "batch": 2, "time": 4, "units": 3, "characters": 20}
TINY |= {"grid-batches": "2", "grid-units": "2,3", "step-counts": "5"}


@pytest.fixture(scope="module")
def throughput():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("throughput")


@pytest.fixture
def run(tmp_path):
    def run(*arguments):
        sizes = [f"--{name}={value}" for name, value in TINY.items()]
        command = [SCRIPT, "--backend", BACKEND, "--out", tmp_path, *sizes]
        return run_python(*command, *arguments), tmp_path

    return run


@pytest.fixture
def measure(throughput):
    """A table, in this process. Only the first contender has one of its own, too."""
    run, alone = throughput.run_process, {}

    def run_once(*arguments):
        if not alone:
            alone.update(run(*arguments))
        return alone

    def measure(name=None, **small):
        sizes = [f"--{name}={value}" for name, value in (TINY | small).items()]
        options = throughput.parse([*sizes, *([f"--{name}"] if name else [])])
        return throughput.MEASURES[options.measure](BACKEND, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "run_process", run_once)
        patch.setattr(throughput, "SMALL", [(3, 2, 2)])
        yield measure


def test_main_table(measure, throughput, tmp_path):
    pytest.importorskip("matplotlib")
    found = measure(rounds=1) | {"machine": throughput.host()}
    printed = throughput.table({BACKEND: found})
    throughput.draw({BACKEND: found}, tmp_path)
    names = {"RNN(LSTMCell)", "LSTM", "RNN(ScratchLSTMCell)", "ScratchLSTM"}
    assert names <= set(found["tokens_per_sec"]) == set(throughput.contenders(BACKEND))
    for name, speed in found["tokens_per_sec"].items():
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert f"| `{name}` | {speed['median']:,.0f} (" in printed
    assert "`ScratchLSTM` / `LSTM`" in found["ratios"]
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    times = {"ScratchLSTM": [1.0, 2.0, 4.0], "LSTM": [3.0, 4.0, 4.0]}
    assert throughput.ratios(times) == {"`ScratchLSTM` / `LSTM`": 2.0}


def test_quick_table(run):
    printed, out = run("--quick")
    found = json.loads((out / "quick.json").read_text())[BACKEND]
    for speed in found["tokens_per_sec"].values():
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
    assert f"\n| {BACKEND} | `ScratchLSTM` | " in printed
    assert "one time step)" in printed.splitlines()[0]  # the rate of its matmul
    assert (out / "quick.md").read_text() == printed


def test_other_tables(measure):
    """Those of `--cells` and `--padded` are in `test_gpu.py`."""
    names = ("grid", "steps", "inference", "small")
    tables = {name: measure(name) for name in names}
    grid = tables["grid"]
    sizes = [(one["batch"], one["units"]) for one in grid["cells"]]
    assert sizes == [(2, 2), (2, 3)]
    ratios = [one["ratio"] for one in grid["cells"]]
    assert grid["min"] == min(ratios)
    assert grid["geometric_mean"] == pytest.approx(statistics.geometric_mean(ratios))
    assert [one["steps"] for one in tables["steps"]["lengths"]] == [5]
    assert tables["inference"]["generation_ratio"] > 0
    pairs = ["`ScratchLSTM` / `LSTM`", "`Bidirectional` of each"]
    for model in tables["small"]["models"]:
        assert list(model["ratios"]) == pairs
        assert min(model["ratios"].values()) > 0


def test_generators_return_same_text(throughput):
    import inference
    import numpy as np

    compiled, by_predict = inference.generators(units=16, characters=30)
    start = np.array([[1]], "int32")
    found = compiled(start)
    np.testing.assert_array_equal(found, by_predict(start))
    assert len(found) == 30


@pytest.mark.parametrize("wrong", ["0", "1.5", "a"])
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


def test_rounds_are_interleaved(throughput):
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    times = throughput.interleave(functions, 3)
    assert "".join(called) == "abcbcacab"
    assert [len(values) for values in times.values()] == [3, 3, 3]
