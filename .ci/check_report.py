"""Check the report that a short run of `examples/time_machine.py` wrote."""

import csv
import json
import math
import struct
import sys
from pathlib import Path

out = Path(sys.argv[1])
runs = json.loads((out / "results.json").read_text())["runs"]
names = ["ScratchLSTMCell", "LSTMCell", "ScratchLSTM"]
assert [run["layer"] for run in runs] == [*names, "d2l"], runs
for run in runs:
    assert run["epochs"] == 3, run
    # An untrained model has the perplexity of a uniform guess among 28 tokens.
    assert 1 < run["perplexity"] < 25, run
    assert run["tokens_per_sec"] > 0, run
    assert run["seconds"] > 0, run
    assert all(text.startswith(start) for start, text in run["samples"].items()), run
cell, *others, _ = (run["perplexity"] for run in runs)
assert all(math.isclose(cell, other, rel_tol=1e-3) for other in others), runs

with open(out / "history.csv") as file:
    rows = list(csv.DictReader(file))
assert len(rows) == 12, rows
for name in names:
    assert (out / f"{name}.keras").stat().st_size > 10_000
    assert (out / f"{name}.html").read_text().rstrip().endswith("</html>")
assert (out / "perplexity.svg").read_text().rstrip().endswith("</svg>")
header = (out / "perplexity.png").read_bytes()[:24]
assert header[:8] == b"\x89PNG\r\n\x1a\n"
assert struct.unpack(">II", header[16:])[0] > 900
print("The report is complete.")
