import re

import custom_gates
import pytest


@pytest.mark.slow
def test_each_cell_learns_and_only_results_are_printed(capfd, monkeypatch):
    monkeypatch.delitem(custom_gates.CELLS, "plain")  # which every test trains
    custom_gates.main(["--steps", "12", "--epochs", "6"])
    printed, errors = capfd.readouterr()
    assert errors == ""
    row = r" *(\w+): \d+ weights, accuracy (\S+)%\n"
    assert re.fullmatch(f"({row})+", printed)
    accuracy = {name: float(value) for name, value in re.findall(row, printed)}
    assert list(accuracy) == list(custom_gates.CELLS)
    assert min(accuracy.values()) > 60  # chance is about 1 in 10
