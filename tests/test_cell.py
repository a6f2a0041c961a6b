import re

import keras
import numpy as np
import pytest
from custom_cells import PeepholeCell
from keras import layers, ops
from reference import NAMES, assert_close, fuse, label, lstm_step, weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

numpy = ops.convert_to_numpy


# --- the equations -----------------------------------------------------------


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)]
)
def test_time_step_matches_numpy_reference(rng, dtype, tolerance, use_bias):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only where it is enabled for the process")
    cell = ScratchLSTMCell(
        6, use_bias=use_bias, bias_initializer="random_normal", dtype=dtype
    )
    x, h, c = (rng.normal(size=(3, size)).astype(dtype) for size in (5, 6, 6))
    output, states = cell(x, [h, c])
    expected_h, expected_c = lstm_step(x, h, c, weights_of(cell))
    assert_close([output, *states], [expected_h, expected_h, expected_c], tolerance)


# --- the same as the built-in cell -------------------------------------------


def drawn_by_numpy(shape, dtype=None):
    return drawn_by_numpy.rng.normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_bias": False},
        {"unit_forget_bias": False},
        {"bias_initializer": keras.initializers.RandomNormal(seed=3)},
        {"kernel_initializer": drawn_by_numpy},
        {"recurrent_initializer": None},
        {"dtype": "mixed_float16"},
    ],
    ids=label,
)
def test_same_seed_gives_the_same_weights(arguments):
    values = []
    for make in (ScratchLSTM, layers.LSTM):
        keras.utils.set_random_seed(7)
        drawn_by_numpy.rng = np.random.default_rng(7)
        layer = make(6, **arguments)
        layer.build((None, None, 5))
        values.append(layer.get_weights())
    ours, theirs = values
    assert len(ours) == (8 if arguments.get("use_bias") is False else 12)
    for one, other in zip(fuse(ours), theirs, strict=True):
        assert np.ptp(other) > 0 or "unit_forget_bias" in arguments
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_same_seed_gives_the_same_dropout_masks(draw, rate):
    x, rates, rnns = draw(3, 7, 5), {"dropout": rate, "recurrent_dropout": rate}, []
    for cell in (ScratchLSTMCell, layers.LSTMCell):
        keras.utils.set_random_seed(7)
        rnns.append(layers.RNN(cell(6, seed=11, **rates), return_sequences=True))
    ours, theirs = rnns
    try:
        expected = ops.convert_to_numpy(theirs(x, training=True))
    except ValueError:
        pytest.skip("this version of Keras rejects a dropout of 1")
    dropped = ops.convert_to_numpy(ours(x, training=True))
    assert_close(dropped, expected)
    # In the built-in cell, 1 drops nothing.
    assert np.allclose(dropped, ops.convert_to_numpy(ours(x))) == (rate == 1)


class SubclassedModel(keras.Model):
    """Keras first traces it with variables that have no value yet."""

    def __init__(self, cell):
        super().__init__()
        self.rnn = layers.RNN(cell)

    def call(self, x):
        return self.rnn(x)


def test_training_of_a_subclassed_model_gives_the_built_in_cells_weights(draw):
    x, y, results = draw(8, 7, 5), draw(8, 6), []
    for cell_class in (ScratchLSTMCell, layers.LSTMCell):
        keras.utils.set_random_seed(7)
        model = SubclassedModel(cell_class(6))
        model.compile(keras.optimizers.SGD(1.0), "mse")
        model.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=0)
        results.append([numpy(weight) for weight in model.trainable_variables])
    ours, theirs = results
    for one, other in zip(fuse(ours), theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# --- per gate ----------------------------------------------------------------


def test_per_gate_initializer_is_drawn_on_the_shape_of_the_gate(seed):
    given = keras.initializers.GlorotUniform(seed=seed)
    cell = ScratchLSTMCell(6, kernel_initializer={"f": given, "o": "zeros"})
    cell.build((None, 5))
    np.testing.assert_array_equal(numpy(cell.W_xf), numpy(given((5, 6))))
    assert not numpy(cell.W_xo).any()
    # The other gates keep the default, each with a draw of its own.
    limit = np.sqrt(6 / (5 + 6))
    for default in (numpy(cell.W_xi), numpy(cell.W_xc)):
        assert 0.5 * limit < abs(default).max() <= limit
    assert not np.allclose(numpy(cell.W_xi), numpy(cell.W_xc))


@pytest.mark.parametrize(
    ("arguments", "b_f"),
    [
        ({"bias_initializer": {"i": "ones"}}, 1),
        ({"bias_initializer": {"f": "zeros"}}, 0),
        ({"bias_initializer": {"i": "ones"}, "unit_forget_bias": False}, 0),
    ],
)
def test_forget_bias_with_per_gate_initializers(arguments, b_f):
    cell = ScratchLSTMCell(6, **arguments)
    cell.build((None, 5))
    assert set(numpy(cell.b_f)) == {b_f}
    assert set(numpy(cell.b_c)) == {0}


# --- custom cells ------------------------------------------------------------


def test_custom_gates_match_numpy_reference(draw):
    cell = PeepholeCell(6)
    x, h, c = draw(3, 5), draw(3, 6), draw(3, 6)
    _, states = cell(x, [h, c])
    assert_close(states, lstm_step(x, h, c, weights_of(cell)), 1e-6)


def returning(change):
    """A cell whose `gates` returns `change` of the gates."""

    class Cell(ScratchLSTMCell):
        def gates(self, x, h, c):
            return change(super().gates(x, h, c))

    return Cell(6)


def test_custom_gates_may_return_a_list(draw):
    cell = returning(lambda gates: list(gates._replace(o=1.0)))
    output, _, c = layers.RNN(cell, return_state=True)(draw(3, 7, 5))
    np.testing.assert_allclose(numpy(output), np.tanh(numpy(c)), atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize(
    ("change", "received"),
    [
        (lambda gates: gates[:3], "3 values"),
        (lambda gates: gates.i, r"\w*(Tensor|Tracer|Array)\w*"),  # of four samples
        (lambda gates: gates._asdict(), "dict"),
    ],
    ids=["three", "tensor", "dict"],
)
def test_wrong_return_value_of_custom_gates(draw, change, received, rate):
    cell = type(returning(change))(6, recurrent_dropout=rate)
    cell.build((None, 5))
    states = [ops.convert_to_tensor(draw(4, 6)) for _ in "hc"]
    message = r"`gates` must return `Gates\(i, f, o, c_tilde\)`\. Received: " + received
    with pytest.raises(ValueError, match=message):
        cell(draw(4, 5), states, training=True)


@pytest.mark.parametrize("argument", ["dropout", "recurrent_dropout"])
def test_dropout_applies_to_custom_gates(draw, argument):
    rnn = layers.RNN(PeepholeCell(6, seed=3, **{argument: 0.5}))
    x = draw(3, 7, 5)
    assert not np.allclose(numpy(rnn(x, training=True)), numpy(rnn(x)))


# --- configuration -----------------------------------------------------------


def test_implementation_is_accepted_and_ignored():
    config = ScratchLSTM(6, implementation=1).get_config()
    assert "implementation" not in config
    other = ScratchLSTM.from_config(config | {"implementation": 2})
    assert other.get_config() == config


# --- errors ------------------------------------------------------------------


GATE_KEYS = "The keys of `{}` must be among 'i', 'f', 'o' and 'c'. Received: {!r}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"units": units}, "`units` must be a positive integer. Received: units=")
            for units in (0, 2.5, True)
        ),
        *(
            ({name: value}, f"`{name}` must be a number from 0 to 1. Received: {name}=")
            for name in ("dropout", "recurrent_dropout")
            for value in (-0.1, float("nan"))
        ),
        *(
            ({name: {"i": None, gate: None}}, GATE_KEYS.format(name, gate))
            for name, gate in [("kernel_initializer", "g"), ("bias_regularizer", 0)]
        ),
    ],
    ids=str,
)
def test_invalid_arguments(arguments, message):
    for make in (ScratchLSTMCell, ScratchLSTM):
        with pytest.raises(ValueError, match="^" + re.escape(message) + ".*$"):
            make(**{"units": 6, **arguments})


def test_weight_of_an_unbuilt_cell():
    for cell in (ScratchLSTMCell(6, name="one"), ScratchLSTM(6).cell):
        for name in NAMES:
            message = rf"`{name}` does not exist until `{cell.name}` is built\. Call"
            with pytest.raises(AttributeError, match=message):
                getattr(cell, name)
        with pytest.raises(AttributeError, match="W_hg"):
            _ = cell.W_hg
        cell.build((None, 5))
        assert [getattr(cell, name).shape[-1] for name in NAMES] == [6] * 12


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("into", ["layer", "store", "file"])
def test_fused_weights_are_rejected(tmp_path, into, use_bias):
    def model(layer):
        return keras.Sequential([keras.Input((7, 5)), layer(6, use_bias=use_bias)])

    ours, theirs = model(ScratchLSTM), model(layers.LSTM)
    before, fused = ours.get_weights(), theirs.get_weights()
    assert len(fused) == (3 if use_bias else 2)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    load = {
        "layer": lambda: ours.layers[0].set_weights(fused),
        "store": lambda: ours.layers[0].cell.load_own_variables(dict(enumerate(fused))),
        "file": lambda: ours.load_weights(tmp_path / "theirs.weights.h5"),
    }
    match = rf"expect(ed|ing) {len(before)} (weight|variable)s"
    with pytest.raises(ValueError, match=match):
        load[into]()
    for one, other in zip(before, ours.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
