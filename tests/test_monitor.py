import csv

import keras
import numpy as np
import pytest
from keras import ops

from keras_scratch_lstm import GateMonitor, ScratchLSTM, ScratchLSTMCell, trace_gates

TIME, FEATURES, UNITS = 4, 3, 5
WEIGHTS = [letter + gate for gate in "ifoc" for letter in ("W_x", "W_h", "b_")]
SHARES = [f"{gate}_{side}_saturated" for gate in "ifo" for side in ("left", "right")]
LAYERS = {
    "LSTM": lambda **kwargs: keras.layers.LSTM(UNITS, **kwargs),
    "RNN(LSTMCell)": lambda **kwargs: keras.layers.RNN(
        keras.layers.LSTMCell(UNITS), **kwargs
    ),
    "RNN(ScratchLSTMCell)": lambda **kwargs: keras.layers.RNN(
        ScratchLSTMCell(UNITS), **kwargs
    ),
    "ScratchLSTM": lambda **kwargs: ScratchLSTM(UNITS, **kwargs),
}


@pytest.fixture
def data(rng):
    x = rng.normal(size=(16, TIME, FEATURES)).astype("float32")
    return 3 * x, np.float32(rng.normal(size=(16, 1)))


def build(*layers, batch_size=None):
    keras.utils.set_random_seed(0)
    inputs = keras.Input(batch_shape=(batch_size, TIME, FEATURES))
    model = keras.Sequential([inputs, *layers, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def gate_of_fused(fused, gate):
    """A gate's share of a built-in weight, in the built-in order i, f, c, o."""
    return np.split(fused, 4, axis=-1)["ifco".index(gate)]


@pytest.mark.parametrize("kind", LAYERS)
def test_the_logs_have_what_the_gates_do(kind, data, tmp_path):
    log = tmp_path / "log.csv"
    layer = LAYERS[kind](name="lstm")
    model = build(layer)
    probe = data[0][:3]
    weights = []  # at the end of each epoch
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: weights.append(layer.get_weights())
    )
    callbacks = [GateMonitor(probe), keras.callbacks.CSVLogger(log), keep]
    history = model.fit(*data, epochs=3, verbose=0, callbacks=callbacks).history
    assert set(history) == {
        "loss",
        *(f"lstm/{name}" for name in SHARES),
        *(f"lstm/{name}_norm" for name in WEIGHTS),
    }
    # The last epoch's, from the model as it is now.
    trace = trace_gates(model, probe)
    for gate in "ifo":
        values = getattr(trace, gate)
        left, right = np.mean(values < 0.1), np.mean(values > 0.9)
        assert history[f"lstm/{gate}_left_saturated"][-1] == pytest.approx(left)
        assert history[f"lstm/{gate}_right_saturated"][-1] == pytest.approx(right)
    assert len(weights) == 3
    for name in WEIGHTS:
        norms = []
        for values in weights:
            if "Scratch" in kind:
                weight = values[WEIGHTS.index(name)]
            else:
                fused = dict(zip(("W_x", "W_h", "b_"), values, strict=True))
                weight = gate_of_fused(fused[name[:-1]], name[-1])
            norms.append(np.sqrt((weight.astype("float64") ** 2).sum()))
        assert history[f"lstm/{name}_norm"] == pytest.approx(norms, rel=1e-5)
        assert len(set(norms)) == 3  # they change while it trains
    with open(log) as file:
        rows = list(csv.DictReader(file))
    for key, values in history.items():
        assert [float(row[key]) for row in rows] == pytest.approx(values)


def test_saturation_is_that_of_the_probe(data):
    x, _ = data
    model = build(keras.layers.LSTM(UNITS, name="lstm"))
    shares = []
    for probe in (x, 1000 * x):
        monitor = GateMonitor(probe)
        monitor.set_model(model)
        logs = {}
        monitor.on_epoch_end(0, logs)
        shares.append(logs["lstm/i_left_saturated"] + logs["lstm/i_right_saturated"])
    assert shares[0] < 0.9 < shares[1]


def test_both_directions_are_monitored(data):
    model = build(keras.layers.Bidirectional(LAYERS["ScratchLSTM"](name="lstm")))
    history = model.fit(*data, verbose=0, callbacks=[GateMonitor(data[0])]).history
    names = {key.partition("/")[0] for key in history if "/" in key}
    assert names == {"forward_lstm", "backward_lstm"}
    forward, backward = (history[f"{name}/W_hf_norm"] for name in sorted(names)[::-1])
    assert forward != backward


def test_one_layer_of_a_stack(data):
    model = build(
        LAYERS["LSTM"](name="lower", return_sequences=True),
        LAYERS["LSTM"](name="upper"),
    )
    monitor = GateMonitor(data[0], layer="upper")
    history = model.fit(*data, verbose=0, callbacks=[monitor]).history
    assert {key.partition("/")[0] for key in history} == {"loss", "upper"}
    with pytest.raises(ValueError, match="choose one of: 'lower', 'upper'"):
        model.fit(*data, verbose=0, callbacks=[GateMonitor(data[0])])


def test_weights_of_a_cells_own_are_among_them(data):
    class PeepholeCell(ScratchLSTMCell):
        def build(self, input_shape):
            super().build(input_shape)
            self.W_cf = self.add_weight(name="W_cf", shape=(self.units,))

        def gates(self, x, h, c):
            gates = super().gates(x, h, c)
            return gates._replace(f=gates.f * ops.sigmoid(c * self.W_cf))

    model = build(ScratchLSTM(cell=PeepholeCell(UNITS), name="lstm"))
    history = model.fit(*data, verbose=0, callbacks=[GateMonitor(data[0])]).history
    norm = np.linalg.norm(ops.convert_to_numpy(model.layers[0].cell.W_cf))
    assert history["lstm/W_cf_norm"] == [pytest.approx(norm)]


def test_training_goes_on_as_without_it(data):
    losses, states = [], []
    for callbacks in ([], [GateMonitor(data[0][:8])]):
        keras.utils.set_random_seed(1)
        layer = LAYERS["ScratchLSTM"](stateful=True, dropout=0.3, seed=1)
        model = build(layer, batch_size=8)
        history = model.fit(
            *data,
            batch_size=8,
            epochs=3,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        ).history
        losses.append(history["loss"])
        states.append([ops.convert_to_numpy(state) for state in layer.states])
    np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(*states)
