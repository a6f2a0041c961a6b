import json

import keras
import numpy as np
import pytest
from keras import layers
from reference import NAMES, fuse, label, lstm_step, sigmoid, weights_of

from keras_scratch_lstm import Gates, ScratchLSTMCell

numpy = keras.ops.convert_to_numpy


def pair(wrap=lambda cell: cell, **arguments):
    """Our cell and the built-in one, from the same seed, in the same wrapper."""
    result = []
    for cell in (ScratchLSTMCell, layers.LSTMCell):
        keras.utils.set_random_seed(7)
        result.append(wrap(cell(6, **arguments)))
    return result


def flat(outputs):
    return [numpy(output) for output in keras.tree.flatten(outputs)]


def assert_equal(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert np.ptp(one.astype("float32")) > 0  # not all masked or dropped away
        tolerance = {"float16": 5e-3, "bfloat16": 4e-2}.get(str(one.dtype), 1e-5)
        np.testing.assert_allclose(
            one.astype("float64"), other.astype("float64"), atol=tolerance
        )


# --- the equations -----------------------------------------------------------


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)]
)
def test_a_step_follows_the_equations(rng, dtype, tolerance, use_bias):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only where it is switched on for the process")
    cell = ScratchLSTMCell(
        6, use_bias=use_bias, bias_initializer="random_normal", dtype=dtype
    )
    x, h, c = (rng.normal(size=(3, size)).astype(dtype) for size in (5, 6, 6))
    output, states = cell(x, [h, c])
    expected_h, expected_c = lstm_step(x, h, c, weights_of(cell))
    np.testing.assert_allclose(numpy(output), expected_h, atol=tolerance)
    np.testing.assert_allclose(numpy(states[0]), expected_h, atol=tolerance)
    np.testing.assert_allclose(numpy(states[1]), expected_c, atol=tolerance)


def test_the_weights_have_the_books_names_order_and_shapes():
    cell = ScratchLSTMCell(6)
    cell.build((None, 5))
    assert [weight.name for weight in cell.weights] == NAMES
    for name in NAMES:
        shape = {"W_x": (5, 6), "W_h": (6, 6), "b": (6,)}[name[:-1].rstrip("_")]
        assert getattr(cell, name).shape == shape
        assert any(getattr(cell, name) is weight for weight in cell.weights)


def test_without_bias_there_are_eight_weights():
    cell = ScratchLSTMCell(6, use_bias=False)
    cell.build((None, 5))
    names = [name for name in NAMES if name.startswith("W")]
    assert [weight.name for weight in cell.weights] == names


def test_other_activations(rng):
    ours, theirs = pair(
        layers.RNN, activation="relu", recurrent_activation="hard_sigmoid"
    )
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    assert_equal(ours(x), theirs(x))


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
        {
            "bias_initializer": keras.initializers.RandomNormal(seed=3),
            "unit_forget_bias": False,
        },
        {"kernel_initializer": "he_normal", "recurrent_initializer": "random_uniform"},
        {"kernel_initializer": drawn_by_numpy},
        {"recurrent_initializer": None},
        {"dtype": "mixed_float16"},
    ],
    ids=label,
)
def test_the_same_seed_gives_the_same_weights(arguments):
    values = []
    for cell in (ScratchLSTMCell, layers.LSTMCell):
        keras.utils.set_random_seed(7)
        drawn_by_numpy.rng = np.random.default_rng(7)
        cell = cell(6, **arguments)
        cell.build((None, 5))
        values.append(cell.get_weights())
    ours, theirs = values
    assert len(ours) == (8 if arguments.get("use_bias") is False else 12)
    for one, other in zip(fuse(ours), theirs, strict=True):
        assert np.ptp(other) > 0 or "unit_forget_bias" in arguments
        np.testing.assert_array_equal(one, other)


WRAPPERS = {
    "plain": layers.RNN,
    "sequences": lambda cell: layers.RNN(cell, return_sequences=True),
    "states": lambda cell: layers.RNN(cell, return_state=True),
    "backwards": lambda cell: layers.RNN(
        cell, go_backwards=True, return_sequences=True
    ),
    "unrolled": lambda cell: layers.RNN(cell, unroll=True, return_sequences=True),
    "stateful": lambda cell: layers.RNN(cell, stateful=True, return_sequences=True),
    "stacked": lambda cell: layers.RNN(
        layers.StackedRNNCells([cell, type(cell)(4)]), return_state=True
    ),
    "bidirectional": lambda cell: layers.Bidirectional(
        layers.RNN(cell, return_sequences=True)
    ),
}


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wherever_a_cell_goes(rng, wrapper, masked):
    ours, theirs = pair(WRAPPERS[wrapper])
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    mask = (np.arange(7) < np.array([[7], [4], [1]])) if masked else None
    first = ours(x, mask=mask), theirs(x, mask=mask)
    assert_equal(*first)
    second = ours(x, mask=mask), theirs(x, mask=mask)
    assert_equal(*second)
    carried = not np.allclose(flat(first[0])[0], flat(second[0])[0])
    assert carried == (wrapper == "stateful")


def test_initial_states(rng):
    ours, theirs = pair(lambda cell: layers.RNN(cell, return_state=True))
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    states = [rng.normal(size=(3, 6)).astype("float32") for _ in "hc"]
    outputs = ours(x, initial_state=states), theirs(x, initial_state=states)
    assert_equal(*outputs)
    assert not np.allclose(flat(outputs[0])[0], flat(ours(x))[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 0.4},
        {"recurrent_dropout": 0.4},
        {"dropout": 0.4, "recurrent_dropout": 0.3},
        {"dropout": 1.0, "recurrent_dropout": 1.0},
    ],
    ids=str,
)
def test_the_same_seed_drops_the_same(rng, arguments):
    ours, theirs = pair(
        lambda cell: layers.RNN(cell, return_sequences=True), seed=11, **arguments
    )
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    try:
        expected = theirs(x, training=True)
    except ValueError:
        pytest.skip("this version of Keras refuses a dropout of 1")
    dropped = ours(x, training=True)
    assert_equal(dropped, expected)
    assert_equal(ours(x), theirs(x))
    # The built-in cell takes 1.0 for no dropout at all.
    has_effect = not np.allclose(numpy(dropped), numpy(ours(x)))
    assert has_effect == (1.0 not in arguments.values())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dropout": 0.4, "recurrent_dropout": 0.3, "seed": 11},
        {"kernel_regularizer": "l2", "bias_constraint": "non_neg"},
    ],
    ids=str,
)
def test_a_training_step_leaves_the_same_weights(rng, arguments):
    x = rng.normal(size=(8, 7, 5)).astype("float32")
    y = rng.normal(size=(8, 6)).astype("float32")
    after = []
    for rnn in pair(layers.RNN, **arguments):
        model = keras.Sequential([keras.Input((7, 5)), rnn])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        before = rnn.cell.get_weights()
        model.fit(x, y, epochs=2, batch_size=4, shuffle=False, verbose=0)
        after.append(rnn.cell.get_weights())
        assert not np.allclose(before[0], after[-1][0])
    for one, other in zip(fuse(after[0]), after[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(rng, dtype_policy, policy):
    dtype_policy(policy)
    ours, theirs = pair(lambda cell: layers.RNN(cell, return_sequences=True))
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    assert_equal(ours(x), theirs(x))
    assert {weight.dtype for weight in ours.weights} == {"float32"}


def test_built_within_a_subclassed_model(rng):
    """Where Keras first traces a model with variables that have no value yet."""

    class Model(keras.Model):
        def __init__(self, cell):
            super().__init__()
            self.rnn = layers.RNN(cell)

        def call(self, x):
            return self.rnn(x)

    x = rng.normal(size=(8, 7, 5)).astype("float32")
    ours, theirs = pair(Model)
    for model in (ours, theirs):
        model.compile("sgd", "mse")
        model.fit(x, np.zeros((8, 6), "float32"), verbose=0)
    assert_equal(ours(x), theirs(x))


# --- by gate -----------------------------------------------------------------


def test_an_initializer_by_gate_is_drawn_on_the_gates_own_shape(seed):
    given = keras.initializers.GlorotUniform(seed=seed)
    cell = ScratchLSTMCell(6, kernel_initializer={"f": given, "o": "zeros"})
    cell.build((None, 5))
    np.testing.assert_array_equal(numpy(cell.W_xf), numpy(given((5, 6))))
    assert not numpy(cell.W_xo).any()
    # The others keep the default, each drawn for itself.
    limit = np.sqrt(6 / (5 + 6))
    for kept in (numpy(cell.W_xi), numpy(cell.W_xc)):
        assert 0.5 * limit < abs(kept).max() <= limit
    assert not np.allclose(numpy(cell.W_xi), numpy(cell.W_xc))


@pytest.mark.parametrize(
    ("arguments", "b_f"),
    [
        ({"bias_initializer": {"i": "ones"}}, 1),
        ({"bias_initializer": {"f": "zeros"}}, 0),
        ({"bias_initializer": {"i": "ones"}, "unit_forget_bias": False}, 0),
    ],
)
def test_the_forget_bias_of_a_dict(arguments, b_f):
    cell = ScratchLSTMCell(6, **arguments)
    cell.build((None, 5))
    assert set(numpy(cell.b_f)) == {b_f}
    assert set(numpy(cell.b_c)) == {0}


def test_a_regularizer_by_gate():
    cell = ScratchLSTMCell(6, recurrent_regularizer={"f": keras.regularizers.L2(0.5)})
    cell.build((None, 5))
    assert len(cell.losses) == 1
    expected = 0.5 * np.square(numpy(cell.W_hf)).sum()
    np.testing.assert_allclose(numpy(cell.losses[0]), expected, rtol=1e-5)


def test_a_constraint_by_gate(rng):
    rnn = layers.RNN(ScratchLSTMCell(6, kernel_constraint={"o": "non_neg"}))
    model = keras.Sequential([keras.Input((7, 5)), rnn])
    model.compile("sgd", "mse")
    x = rng.normal(size=(8, 7, 5)).astype("float32")
    assert numpy(rnn.cell.W_xo).min() < 0
    model.fit(x, np.zeros((8, 6), "float32"), verbose=0)
    assert numpy(rnn.cell.W_xo).min() >= 0
    assert numpy(rnn.cell.W_xi).min() < 0


# --- gates of one's own ------------------------------------------------------


@keras.saving.register_keras_serializable("tests")
class CoupledPeepholeCell(ScratchLSTMCell):
    """Forgets as much as it takes in, and its input gate sees the memory."""

    def build(self, input_shape):
        super().build(input_shape)
        self.p_i = self.add_weight(name="p_i", shape=(self.units,))

    def gates(self, x, h, c):
        i = keras.ops.sigmoid(x @ self.W_xi + h @ self.W_hi + c * self.p_i + self.b_i)
        return super().gates(x, h, c)._replace(i=i, f=1 - i)


def test_overridden_gates(rng):
    cell = CoupledPeepholeCell(6)
    x, h, c = (rng.normal(size=(3, size)).astype("float32") for size in (5, 6, 6))
    new_h, (_, new_c) = cell(x, [h, c])
    w = weights_of(cell)
    i = sigmoid(x @ w["W_xi"] + h @ w["W_hi"] + c * w["p_i"] + w["b_i"])
    o = sigmoid(x @ w["W_xo"] + h @ w["W_ho"] + w["b_o"])
    c_tilde = np.tanh(x @ w["W_xc"] + h @ w["W_hc"] + w["b_c"])
    expected_c = (1 - i) * c + i * c_tilde
    np.testing.assert_allclose(numpy(new_c), expected_c, atol=1e-6)
    np.testing.assert_allclose(numpy(new_h), o * np.tanh(expected_c), atol=1e-6)


def test_overridden_gates_may_be_a_plain_tuple(rng):
    class Open(ScratchLSTMCell):
        def gates(self, x, h, c):
            return tuple(super().gates(x, h, c)._replace(o=1.0))

    x = rng.normal(size=(3, 7, 5)).astype("float32")
    output, _, c = layers.RNN(Open(6), return_state=True)(x)
    np.testing.assert_allclose(numpy(output), np.tanh(numpy(c)), atol=1e-6)


@pytest.mark.parametrize("argument", ["dropout", "recurrent_dropout"])
def test_overridden_gates_are_dropped_out_too(rng, argument):
    rnn = layers.RNN(CoupledPeepholeCell(6, seed=3, **{argument: 0.5}))
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    assert not np.allclose(numpy(rnn(x, training=True)), numpy(rnn(x)))


def test_gates_can_be_asked_for_directly(rng):
    cell = ScratchLSTMCell(6)
    x, h, c = (rng.normal(size=(3, size)).astype("float32") for size in (5, 6, 6))
    _, (_, new_c) = cell(x, [h, c])
    gates = cell.gates(
        keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(h), c
    )
    assert isinstance(gates, Gates)
    i, f, o, c_tilde = map(numpy, gates)
    np.testing.assert_allclose(f * c + i * c_tilde, numpy(new_c), atol=1e-6)
    assert o.min() > 0
    assert o.max() < 1


# --- configuration and files -------------------------------------------------


FULL = {
    "units": 6,
    "activation": "relu",
    "recurrent_activation": "hard_sigmoid",
    "use_bias": True,
    "kernel_initializer": {"i": "zeros", "f": keras.initializers.Constant(0.5)},
    "recurrent_initializer": "he_normal",
    "bias_initializer": {"o": "ones"},
    "unit_forget_bias": False,
    "kernel_regularizer": {"c": keras.regularizers.L1(0.1)},
    "recurrent_regularizer": "l2",
    "bias_regularizer": {"i": "l1"},
    "kernel_constraint": {"c": "non_neg"},
    "recurrent_constraint": keras.constraints.MaxNorm(2.0),
    "bias_constraint": {"f": "unit_norm"},
    "dropout": 0.25,
    "recurrent_dropout": 0.125,
    "seed": 5,
    "name": "my_cell",
    "dtype": "float32",
}


@pytest.mark.parametrize("arguments", [{"units": 6}, FULL], ids=["default", "full"])
def test_the_configuration_comes_back(arguments):
    cell = ScratchLSTMCell(**arguments)
    config = cell.get_config()
    assert set(FULL) <= set(config)
    config = json.loads(json.dumps(config))
    again = ScratchLSTMCell.from_config(config)
    assert again.get_config() == config
    again.build((None, 5))
    assert len(again.weights) == 12


def test_registered_under_the_packages_name():
    name = keras.saving.get_registered_name(ScratchLSTMCell)
    assert name == "keras_scratch_lstm>ScratchLSTMCell"


@pytest.mark.parametrize("cell", [ScratchLSTMCell, CoupledPeepholeCell])
def test_a_saved_model_comes_back(rng, tmp_path, cell):
    rnn = layers.RNN(cell(**FULL), return_sequences=True)
    model = keras.Sequential([keras.Input((7, 5)), rnn, layers.Dense(2)])
    x = rng.normal(size=(3, 7, 5)).astype("float32")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.layers[0].cell) is cell
    np.testing.assert_array_equal(numpy(again(x)), numpy(model(x)))
    model.save_weights(tmp_path / "model.weights.h5")
    again.set_weights([0 * value for value in again.get_weights()])
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(numpy(again(x)), numpy(model(x)))


# --- wrong input -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": 0}, "`units` is 0; expected a positive integer"),
        ({"units": -3}, "`units` is -3; expected a positive integer"),
        ({"units": 2.5}, "`units` is 2.5; expected a positive integer"),
        ({"units": "6"}, "`units` is '6'; expected a positive integer"),
        ({"units": None}, "`units` is None; expected a positive integer"),
        ({"units": True}, "`units` is True; expected a positive integer"),
        ({"dropout": -0.1}, "`dropout` is -0.1; expected a number from 0 to 1"),
        ({"dropout": 1.5}, "`dropout` is 1.5; expected a number from 0 to 1"),
        ({"dropout": "a"}, "`dropout` is 'a'; expected a number from 0 to 1"),
        ({"dropout": float("nan")}, "`dropout` is nan; expected a number"),
        ({"recurrent_dropout": 2}, "`recurrent_dropout` is 2; expected a number"),
        (
            {"kernel_initializer": {"g": "zeros"}},
            "`kernel_initializer` names the gate 'g'; expected a dict with keys among "
            "'i', 'f', 'o', 'c'",
        ),
        ({"bias_regularizer": {"c_tilde": "l2"}}, "`bias_regularizer` names the gate"),
        ({"bias_constraint": {0: "non_neg"}}, "`bias_constraint` names the gate 0"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        ScratchLSTMCell(**{"units": 6, **arguments})


@pytest.mark.parametrize("shape", [(3,), (3, 7, 5), (3, None)])
def test_wrong_shapes_to_build_with(shape):
    cell = ScratchLSTMCell(6)
    with pytest.raises(ValueError, match=r"expected \(batch, features\)") as error:
        cell.build(shape)
    assert str(shape) in str(error.value)
    assert not cell.weights


def test_wrong_inputs_once_built(rng):
    cell = ScratchLSTMCell(6)
    cell.build((None, 5))
    states = cell.get_initial_state(3)
    with pytest.raises(ValueError, match=r"(?s)expected .*5.*\(3, 4\)"):
        cell(np.zeros((3, 4), "float32"), states)
    with pytest.raises(ValueError, match=r"(?s)expected ndim=2.*\(3, 7, 5\)"):
        cell(np.zeros((3, 7, 5), "float32"), states)


def test_wrong_states():
    cell = ScratchLSTMCell(6)
    x = np.zeros((3, 5), "float32")
    for shapes in ([(3, 6)], [(3, 6)] * 3, [(3, 6), (3, 5)], [(3, 6), (6,)]):
        states = [np.zeros(shape, "float32") for shape in shapes]
        with pytest.raises(ValueError, match=r"each of shape \(batch, 6\)") as error:
            cell(x, states)
        assert str(shapes) in str(error.value)
