import json
import pickle
import re

import keras
import numpy as np
import pytest
from custom_cells import CoupledCell
from keras import constraints, layers, ops, regularizers
from reference import assert_close, flat, label

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, to_builtin, to_scratch
from keras_scratch_lstm._keras import all_layers

BACKEND = keras.backend.backend()
BUILTIN = (layers.LSTM, layers.LSTMCell)
SCRATCH = (ScratchLSTM, ScratchLSTMCell)
BATCH, TIME, FEATURES = 3, 5, 4
SHAPE = (BATCH, TIME, FEATURES)
numpy = ops.convert_to_numpy


@pytest.fixture
def x(rng):
    return rng.normal(size=SHAPE).astype("float32")


def count(layer, classes):
    return sum(type(part) in classes for part in all_layers(layer))


def config_of(layer):
    """The configuration as in a file, where tuples are lists, without shapes."""

    def drop_shapes(config):
        return {key: v for key, v in config.items() if key != "build_config"}

    return json.loads(json.dumps(layer.get_config()), object_hook=drop_shapes)


def attributes_of(layer):
    """What a layer and those in it keep outside of the configuration."""
    return [
        (p.name, p.trainable, getattr(p, "use_cudnn", "")) for p in all_layers(layer)
    ]


def random_weights(layer, rng):
    for weight in layer.weights:
        values = rng.normal(0, 0.5, weight.shape)
        weight.assign(abs(values) if weight.name == "moving_variance" else values)
    return layer


def model_of(*middle):
    return keras.Sequential([keras.Input((TIME, FEATURES)), *middle])


def built(layer):
    layer.build((None, TIME, FEATURES))
    return layer


def call(layer, inputs, **arguments):
    return flat(layer(*inputs, **arguments))


def assert_same_call(actual, expected, x, tolerance=1e-5):
    assert_close(call(actual, [x]), call(expected, [x]), tolerance)


def assert_equal_weights(actual, expected):
    assert [w.name for w in actual.weights] == [w.name for w in expected.weights]
    assert len(actual.weights) > 0
    for one, other in zip(actual.weights, expected.weights, strict=True):
        assert one is not other
        assert (one.dtype, one.trainable) == (other.dtype, other.trainable)
        np.testing.assert_array_equal(numpy(one), numpy(other))


def assert_round_trip(builtin, inputs, tolerance=1e-5):
    """Outputs are equal after `to_scratch`, and everything is after `to_builtin`."""
    config, weights = config_of(builtin), builtin.get_weights()
    scratch = to_scratch(builtin)
    assert count(scratch, BUILTIN) == 0
    assert count(scratch, SCRATCH) == count(builtin, BUILTIN) > 0
    assert attributes_of(scratch) == attributes_of(builtin)
    assert_close(call(scratch, inputs), call(builtin, inputs), tolerance)

    again = to_builtin(scratch)
    assert count(again, SCRATCH) == 0
    assert_equal_weights(again, builtin)
    assert config_of(again) == config
    assert attributes_of(again) == attributes_of(builtin)
    once_more = to_scratch(again)
    assert_equal_weights(once_more, scratch)
    assert config_of(once_more) == config_of(scratch)

    assert config_of(builtin) == config  # the original is unchanged
    np.testing.assert_equal(builtin.get_weights(), weights)


# --- layers and models -------------------------------------------------------


def all_arguments():
    kinds = ("kernel", "recurrent", "bias")
    config = {f"{kind}_regularizer": "l1l2" for kind in kinds}
    config |= {f"{kind}_constraint": "non_neg" for kind in kinds}
    config |= {"activation": "relu", "recurrent_activation": "hard_sigmoid"}
    config |= {"kernel_initializer": "he_normal", "unit_forget_bias": False}
    config |= {"bias_initializer": keras.initializers.Constant(0.25)}
    config |= {"dropout": 0.25, "recurrent_dropout": 0.125, "seed": 5}
    config |= {"activity_regularizer": "l2", "unroll": True, "name": "my_lstm"}
    config |= {"return_sequences": True, "return_state": True, "go_backwards": True}
    return layers.LSTM(6, **config, use_cudnn=False)


def bidirectional():
    forward = layers.LSTM(6, return_sequences=True)
    backward = layers.LSTM(6, "relu", return_sequences=True, go_backwards=True)
    return layers.Bidirectional(forward, "sum", backward_layer=backward, name="both")


def sequential():
    return model_of(
        layers.Bidirectional(layers.RNN(layers.LSTMCell(3), return_sequences=True)),
        layers.BatchNormalization(),
        layers.LSTM(6),
        layers.Dense(2, name="logits"),
    )


def functional():
    """Two inputs and outputs, a shared LSTM, initial states, nested models."""
    shared = layers.LSTM(3, return_sequences=True, name="shared")
    first = keras.Input((TIME, FEATURES), name="first")
    second = keras.Input((TIME, FEATURES))
    inner_input = keras.Input((TIME, 3))
    inner = layers.LSTM(6, return_state=True, name="inner_lstm")(inner_input)
    inner = keras.Model(inner_input, inner, name="inner")
    _, h, c = inner(shared(first))
    decoder = layers.LSTM(6, return_sequences=True, name="decoder")
    decoded = decoder(shared(second), initial_state=[h, c])
    head = keras.Sequential([layers.LSTM(2, name="last"), layers.Dense(1)], name="head")
    outputs = {"decoded": decoded * 2.0, "head": head(decoded)}
    outputs["again"] = inner(decoded[..., :3])
    return keras.Model([first, second], outputs, name="functional")


CASES = {
    "cell": lambda: layers.LSTMCell(6, name="my_cell"),
    "layer": lambda: layers.LSTM(6),
    "all arguments": all_arguments,
    "no bias": lambda: layers.LSTM(6, use_bias=False, return_sequences=True),
    "mixed precision": lambda: layers.LSTM(6, dtype="mixed_float16"),
    "stacked": lambda: layers.RNN(
        [layers.LSTMCell(6), layers.GRUCell(4), layers.LSTMCell(2)]
    ),
    "Bidirectional": bidirectional,
    "TimeDistributed": lambda: layers.TimeDistributed(layers.LSTM(6)),
    "Sequential": sequential,
    "Functional": functional,
}


def make(case, rng):
    """A built layer or model with random weights, and inputs for it."""
    layer = CASES[case]()
    shapes = {
        "cell": [(BATCH, FEATURES), [(BATCH, 6), (BATCH, 6)]],
        "TimeDistributed": [(BATCH, 2, TIME, FEATURES)],
        "Functional": [[SHAPE, SHAPE]],
    }.get(case, [SHAPE])
    inputs = keras.tree.map_shape_structure(
        lambda shape: rng.normal(size=shape).astype("float32"), shapes
    )
    if not layer.built:
        layer.build(shapes[0])
    return random_weights(layer, rng), inputs


# The others differ in what no backend sees.
EVERYWHERE = ("all arguments", "mixed precision", "Bidirectional", "Functional")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in EVERYWHERE else pytest.mark.one_backend)
        for case in CASES
    ],
)
def test_round_trip_keeps_outputs_weights_and_config(rng, case):
    builtin, inputs = make(case, rng)
    assert_round_trip(builtin, inputs, 2e-3 if case == "mixed precision" else 1e-5)


@pytest.mark.one_backend
def test_layers_beside_operations_of_the_same_name_are_converted(rng, x):
    inputs, outputs = keras.Input((TIME, FEATURES)), []
    for by_layer, by_operation in (
        (layers.Add()([inputs, inputs * 2]), inputs + 1.5),
        (layers.Reshape((-1, 2))(inputs), ops.reshape(inputs, (-1, 2))),
        (layers.Softmax()(inputs), ops.softmax(inputs)),
    ):
        parts = [y._keras_history.operation for y in (by_layer, by_operation)]
        assert type(parts[0]).__name__ == type(parts[1]).__name__
        assert not isinstance(parts[1], layers.Layer)
        outputs += [layers.LSTM(2)(by_layer), by_operation]
    assert_round_trip(random_weights(keras.Model(inputs, outputs), rng), [x])


class Multiply(layers.Layer):
    """A custom layer that is not registered, and has the name of a Keras class."""

    def call(self, x):
        return x * 2

    def compute_output_shape(self, shape):
        return shape


@pytest.mark.parametrize("module", [__name__, "__main__"])
def test_custom_layers_need_not_be_registered(rng, x, module, monkeypatch):
    monkeypatch.setattr(Multiply, "__module__", module)
    inputs = keras.Input((TIME, FEATURES))
    y = layers.TimeDistributed(Multiply())(inputs) * 0.5  # the operation `Multiply`
    y = layers.Multiply()([y, layers.Lambda(lambda x: x + 1)(y)])
    builtin = random_weights(keras.Model(inputs, layers.LSTM(6)(y)), rng)
    assert_same_call(to_scratch(builtin), builtin, x)


def test_a_given_cell_becomes_arguments_of_the_built_in_layer(rng, x):
    options = {
        "activation": "softsign",
        "bias_regularizer": "l2",
        "dtype": "mixed_float16",
    }
    scratch = built(ScratchLSTM(cell=ScratchLSTMCell(6, **options)))
    builtin = to_builtin(random_weights(scratch, rng))
    assert type(builtin) is layers.LSTM
    assert builtin.cell.dtype_policy.name == "mixed_float16"
    assert_same_call(builtin, scratch, x, 2e-3)
    np.testing.assert_equal(to_scratch(builtin).get_weights(), scratch.get_weights())


# --- state -------------------------------------------------------------------


@pytest.mark.parametrize("case", ["layer", "Sequential", "Functional"])
def test_trainable_flags_are_copied(rng, case):
    builtin, _ = make(case, rng)
    lstms = [part for part in all_layers(builtin) if type(part) is layers.LSTM]
    builtin.trainable = False
    if case != "layer":
        builtin.trainable = True
        lstms[0].trainable = False
    lstms[-1].cell.trainable = True
    lstms[-1].cell.recurrent_kernel.trainable = False
    scratch = to_scratch(builtin)
    copies = {part.name: part for part in all_layers(scratch)}
    for weight in copies[lstms[-1].name].weights:
        assert weight.trainable == (not weight.name.startswith("W_h"))
    again = to_builtin(scratch)
    assert_equal_weights(again, builtin)
    assert attributes_of(again) == attributes_of(builtin)
    sizes = [
        sum(np.prod(weight.shape) for weight in model.trainable_weights)
        for model in (scratch, builtin)
    ]
    assert sizes[0] == sizes[1]


def test_random_seeds_and_state_of_preprocessing_layers_are_copied(rng, x):
    normalize = layers.Normalization()
    normalize.adapt(rng.normal(3, 2, size=(8, TIME, FEATURES)))
    builtin = model_of(
        normalize,
        layers.Dropout(0.4, seed=1),
        layers.LSTM(6, dropout=0.4, seed=2, return_sequences=True),
        layers.LSTM(6, recurrent_dropout=0.4, seed=3),
    )
    builtin(x, training=True)
    scratch = to_scratch(builtin)
    again = to_builtin(scratch)
    expected = call(builtin, [x], training=True)
    for model in (scratch, again):
        assert_close(call(model, [x], training=True), expected)


def states(model):
    found = [part.states for part in all_layers(model) if isinstance(part, layers.RNN)]
    assert len(keras.tree.flatten(found)) == 9
    return keras.tree.flatten(found)


def test_states_of_stateful_layers_are_copied(rng):
    options = {"stateful": True, "return_sequences": True}
    middle = [layers.GRU(3, **options), layers.Bidirectional(layers.LSTM(3, **options))]
    middle += [layers.RNN(layers.LSTMCell(6), **options), layers.LSTM(6, **options)]
    builtin = keras.Sequential([keras.Input(batch_shape=SHAPE), *middle])
    for state in states(builtin):
        state.assign(rng.normal(size=state.shape))
    scratch = to_scratch(builtin)
    for model in (scratch, to_builtin(scratch)):
        for one, other in zip(states(builtin), states(model), strict=True):
            assert one is not other
            np.testing.assert_array_equal(numpy(one), numpy(other))


def test_a_compiled_model_trains_like_the_original(rng):
    x = rng.normal(size=(8, TIME, FEATURES)).astype("float32")
    y = rng.normal(size=(8, 2)).astype("float32")
    options = {"kernel_regularizer": "l2", "bias_regularizer": "l1"}
    options |= {"recurrent_constraint": constraints.MaxNorm(0.5)}
    lstm = layers.LSTM(6, **options)
    builtin = random_weights(model_of(lstm, layers.Dense(2)), rng)
    lstm.cell.bias.trainable = False
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9, global_clipnorm=1.0)
    builtin.compile(optimizer, "mse", metrics=["mae"])
    scratch = to_scratch(builtin)
    before = builtin.get_weights()
    for model, number in (scratch, 10), (to_builtin(scratch), 4):
        assert model.optimizer.get_config() == builtin.optimizer.get_config()
        assert len(model.trainable_variables) == number

    def fit(model):
        return model.fit(x, y, 4, epochs=3, shuffle=False, verbose=0).history

    actual = fit(scratch)
    np.testing.assert_equal(builtin.get_weights(), before)
    expected = fit(builtin)
    assert actual.keys() == expected.keys() == {"loss", "mae"}
    for name in actual:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-4)
    assert_same_call(scratch, builtin, x, 1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strings need TensorFlow")
def test_vocabulary_is_copied():
    texts = np.array([["time travels"], ["the time traveller"]])
    vectorize = layers.TextVectorization(output_sequence_length=TIME)
    vectorize.adapt(texts)
    middle = [vectorize, layers.Embedding(10, FEATURES), layers.LSTM(6)]
    builtin = keras.Sequential([keras.Input((1,), dtype="string"), *middle])
    scratch = to_scratch(builtin)
    assert scratch.layers[0].get_vocabulary() == vectorize.get_vocabulary()
    assert_same_call(scratch, builtin, ops.convert_to_tensor(texts))


# --- Bidirectional -----------------------------------------------------------


def test_bidirectional_of_a_converted_layer_raises(rng):
    scratch = to_scratch(make("layer", rng)[0])
    backward = to_scratch(built(layers.LSTM(6, go_backwards=True)))
    for options in ({}, {"backward_layer": backward}):
        with pytest.raises(ValueError, match="would lose its converted weights"):
            layers.Bidirectional(scratch, **options)


def test_converted_bidirectional_models_can_be_saved_and_copied(rng, x, tmp_path):
    builtin = model_of(bidirectional())
    scratch = to_scratch(random_weights(builtin, rng))
    scratch.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(scratch)
    clone.set_weights(scratch.get_weights())
    for model in (loaded, clone, pickle.loads(pickle.dumps(scratch))):
        assert count(model, SCRATCH) == 4
        assert_same_call(model, builtin, x)


# --- regularizers, constraints and initializers ------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel_regularizer", regularizers.OrthogonalRegularizer()),
        ("kernel_regularizer", Multiply),
        ("kernel_constraint", constraints.UnitNorm(axis=[0, 1])),
    ],
    ids=label,
)
def test_regularizers_and_constraints_across_gates_are_rejected(name, value):
    every = value if value is Multiply else dict.fromkeys("ifoc", value)
    builtin = layers.LSTM(6, **{name: value}, name="lstm")
    scratch = ScratchLSTM(6, **{name: every}, name="lstm")
    for layer, convert in ((builtin, to_scratch), (scratch, to_builtin)):
        with pytest.raises(ValueError, match=f"`lstm/lstm_cell`: .* as `{name}` acts"):
            convert(layer)


def test_per_gate_regularizers_are_merged_and_initializers_of_built_layers_dropped(
    rng, x
):
    every = {gate: regularizers.L2(0.1) for gate in "ifoc"}
    initializers = {"f": "ones", "i": "he_normal"}
    layer = ScratchLSTM(6, kernel_regularizer=every, bias_initializer=initializers)
    builtin = to_builtin(built(layer))
    assert isinstance(builtin.kernel_regularizer, regularizers.L2)
    assert isinstance(builtin.bias_initializer, keras.initializers.Zeros)
    assert_same_call(builtin, layer, x)


# --- errors ------------------------------------------------------------------


def subclass(name, base):
    return type(name, (base,), {})(6)


class Subclassed(keras.Model):
    """A model with an LSTM that its configuration does not contain."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lstm = layers.LSTM(6)

    def call(self, x):
        return self.lstm(x)


class WithoutConfig(Multiply):
    def __init__(self, label):
        super().__init__(name=label)


def shared_between_models():
    shared = layers.Dense(FEATURES, name="shared")
    inputs = keras.Input((TIME, FEATURES))
    inner = keras.Model(inputs, shared(inputs), name="inner")
    inputs = keras.Input((TIME, FEATURES))
    return keras.Model(inputs, layers.LSTM(6)(shared(inner(inputs))))


def frozen_gate():
    layer = built(ScratchLSTM(6, name="mine"))
    layer.cell.W_hf.trainable = False
    return layer


TO_SCRATCH_ERRORS = [
    (lambda: "lstm", "a layer or model that contains `LSTM` or `LSTMCell`. Received"),
    (lambda: layers.GRU(6), "Received: model=<GRU name="),
    (lambda: subclass("Mine", layers.LSTM), "`Mine` is a subclass of `LSTM`, whose ch"),
    (lambda: model_of(Subclassed(name="mine")), "`mine`: Keras cannot re-create it"),
    (lambda: model_of(WithoutConfig("mine"), layers.LSTM(6)), "`mine`: Keras cannot r"),
    (shared_between_models, "`shared`: it is shared between models or wrappers"),
]
TO_BUILTIN_ERRORS = [
    (lambda: layers.LSTM(6), "contains `ScratchLSTM` or `ScratchLSTMCell`"),
    (lambda: CoupledCell(6), "`CoupledCell` is a subclass of `ScratchLSTMCell`"),
    (lambda: ScratchLSTM(6, time_major=True), "has no `time_major`"),
    (frozen_gate, "`lstm_cell`: all or none of W_h* must be frozen"),
    (
        lambda: ScratchLSTMCell(6, bias_constraint={"f": "non_neg"}),
        "`bias_constraint` must be the same for all gates",
    ),
    (
        lambda: ScratchLSTMCell(6, bias_initializer={"f": "ones"}),
        "it is not built, and `bias_initializer` differs between gates",
    ),
]


@pytest.mark.parametrize(
    ("convert", "make_it", "message"),
    [(to_scratch, *case) for case in TO_SCRATCH_ERRORS]
    + [(to_builtin, *case) for case in TO_BUILTIN_ERRORS],
)
def test_what_cannot_be_converted_raises_an_error(convert, make_it, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert(make_it())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
