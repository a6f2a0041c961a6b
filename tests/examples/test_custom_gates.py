import subprocess
import sys

import custom_gates
import numpy as np
import pytest
from custom_gates import CELLS, train
from keras import ops


@pytest.mark.parametrize("name", ["peephole", "coupled"])
@pytest.mark.slow
def test_cells_learn(name):
    _, before = train(CELLS[name](8), steps=12, epochs=0)
    model, after = train(CELLS[name](8), steps=12, epochs=6)
    assert after > 0.6 > 0.3 > before  # chance is about 1 in 10
    for weight in model.layers[0].cell.trainable_weights:
        assert np.ptp(ops.convert_to_numpy(weight)) > 0  # the peepholes, too


@pytest.mark.slow
def test_prints_only_its_results():  # not what TensorFlow logs
    command = [sys.executable, custom_gates.__file__, "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    names = [line.partition(":")[0].strip() for line in done.stdout.splitlines()]
    assert names == list(CELLS)
