import numpy as np
import pytest
from custom_gates import CoupledCell, PeepholeCell, train
from keras import ops
from reference import sigmoid, weights_of

from keras_scratch_lstm import ScratchLSTM, trace_gates

numpy = ops.convert_to_numpy


def peephole(x, w):
    """Hidden states at all time steps, from the equations of the paper."""
    h = c = np.zeros((len(x), len(w["b_i"])))
    outputs = []
    for x_t in x.swapaxes(0, 1):
        i = sigmoid(x_t @ w["W_xi"] + h @ w["W_hi"] + w["p_i"] * c + w["b_i"])
        f = sigmoid(x_t @ w["W_xf"] + h @ w["W_hf"] + w["p_f"] * c + w["b_f"])
        c = f * c + i * np.tanh(x_t @ w["W_xc"] + h @ w["W_hc"] + w["b_c"])
        o = sigmoid(x_t @ w["W_xo"] + h @ w["W_ho"] + w["p_o"] * c + w["b_o"])
        h = o * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, 1)


def random_layer(cell, rng, features=3):
    """A layer with the cell and random weights."""
    layer = ScratchLSTM(cell=cell, return_sequences=True)
    layer.build((None, None, features))
    for weight in cell.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return layer


def test_peephole_cell_matches_numpy(rng):
    layer = random_layer(PeepholeCell(5), rng)
    x = rng.normal(size=(4, 6, 3)).astype("float32")
    expected = peephole(x.astype("float64"), weights_of(layer.cell))
    np.testing.assert_allclose(numpy(layer(x)), expected, rtol=0, atol=1e-6)
    assert layer.recurrence == "loop"


def test_coupled_cell_forgets_as_much_as_it_adds(rng):
    layer = random_layer(CoupledCell(5), rng)
    trace = trace_gates(layer, rng.normal(size=(4, 6, 3)).astype("float32"))
    np.testing.assert_allclose(trace.f, 1 - trace.i, rtol=0, atol=1e-6)
    unused = [weight.name for weight in layer.non_trainable_weights]
    assert unused == ["W_xf", "W_hf", "b_f"]


@pytest.mark.parametrize("cell", [PeepholeCell, CoupledCell])
@pytest.mark.slow
def test_cells_learn(cell):
    _, before = train(cell(8), steps=12, epochs=0)
    model, after = train(cell(8), steps=12, epochs=6)
    assert after > 0.6 > 0.3 > before  # chance is about 1 in 10
    for weight in model.layers[0].cell.trainable_weights:
        assert np.ptp(numpy(weight)) > 0  # the peepholes, too, which start at 0
