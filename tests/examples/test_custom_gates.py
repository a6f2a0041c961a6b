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
