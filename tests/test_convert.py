import json
import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import NAMES, fuse, label

from keras_scratch_lstm import (
    ScratchLSTM,
    ScratchLSTMCell,
    from_torch,
    to_builtin,
    to_scratch,
    to_torch,
)

BACKEND = keras.backend.backend()
BUILTIN = (layers.LSTM, layers.LSTMCell)
SCRATCH = (ScratchLSTM, ScratchLSTMCell)
BATCH, TIME, FEATURES = 3, 5, 4
numpy = ops.convert_to_numpy


def parts(layer):
    return list(layer._flatten_layers())


def names(layer):
    return [part.name for part in parts(layer)]


def config_of(layer):
    """As it would be in a file, where a tuple is a list."""
    return json.loads(json.dumps(layer.get_config()))


def count(layer, classes):
    return sum(type(part) in classes for part in parts(layer))


def draw_weights(layer, rng):
    """Weights of which no two are alike."""
    for weight in layer.weights:
        values = rng.normal(0, 0.5, weight.shape)
        weight.assign(abs(values) if weight.name == "moving_variance" else values)
    return layer


def call(layer, inputs, **arguments):
    outputs = keras.tree.flatten(layer(*inputs, **arguments))
    return [numpy(output).astype("float64") for output in outputs]


def assert_same(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert np.ptp(other) > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def assert_equal_weights(ours, theirs):
    assert [weight.name for weight in ours.weights] == [
        weight.name for weight in theirs.weights
    ]
    assert len(ours.weights) > 0
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        assert one is not other
        assert one.dtype == other.dtype
        assert one.trainable == other.trainable
        np.testing.assert_array_equal(numpy(one), numpy(other))


# --- cells, layers and models ------------------------------------------------


def one_cell():
    return layers.LSTMCell(6, name="my_cell")


def all_arguments():
    return layers.LSTM(
        6,
        activation="relu",
        recurrent_activation="hard_sigmoid",
        kernel_initializer=keras.initializers.HeNormal(seed=3),
        recurrent_initializer="he_normal",
        bias_initializer=keras.initializers.Constant(0.25),
        unit_forget_bias=False,
        kernel_regularizer="l1",
        recurrent_regularizer=keras.regularizers.L1L2(0.1, 0.2),
        bias_regularizer="l2",
        activity_regularizer="l2",
        kernel_constraint=keras.constraints.MaxNorm(1.5),
        recurrent_constraint="unit_norm",
        bias_constraint="non_neg",
        dropout=0.25,
        recurrent_dropout=0.125,
        seed=5,
        return_sequences=True,
        return_state=True,
        go_backwards=True,
        unroll=True,
        name="my_lstm",
    )


def two_directions():
    return layers.Bidirectional(
        layers.LSTM(6, return_sequences=True),
        backward_layer=layers.LSTM(
            6, return_sequences=True, go_backwards=True, activation="relu"
        ),
        merge_mode="sum",
        name="both",
    )


def a_sequential():
    return keras.Sequential(
        [
            keras.Input((TIME, FEATURES), name="sequence"),
            layers.Bidirectional(layers.RNN(layers.LSTMCell(3), return_sequences=True)),
            layers.BatchNormalization(),
            layers.LSTM(6),
            layers.Dense(2, name="logits"),
        ],
        name="a_sequential",
    )


def a_functional():
    """Two inputs and outputs, a shared LSTM, initial states, a model in a model."""
    shared = layers.LSTM(3, return_sequences=True, name="shared")
    first = keras.Input((TIME, FEATURES), name="first")
    second = keras.Input((TIME, FEATURES))
    inner_input = keras.Input((TIME, 3))
    inner = layers.LSTM(6, return_state=True, name="inner_lstm")(inner_input)
    inner = keras.Model(inner_input, inner, name="inner")
    _, h, c = inner(shared(first))
    decoded = layers.LSTM(6, return_sequences=True, name="decoder")(
        shared(second), initial_state=[h, c]
    )
    head = keras.Sequential([layers.LSTM(2, name="last"), layers.Dense(1)], name="head")
    return keras.Model(
        [first, second],
        {
            "decoded": decoded * 2.0,
            "head": head(decoded),
            "again": inner(decoded[..., :3]),
        },
        name="a_functional",
    )


CASES = {
    "cell": one_cell,
    "layer": lambda: layers.LSTM(6),
    "all arguments": all_arguments,
    "no bias": lambda: layers.LSTM(6, use_bias=False, return_sequences=True),
    "mixed precision": lambda: layers.LSTM(6, dtype="mixed_float16"),
    "RNN": lambda: layers.RNN(layers.LSTMCell(6), return_sequences=True),
    "stacked": lambda: layers.RNN(
        layers.StackedRNNCells(
            [layers.LSTMCell(6), layers.GRUCell(4), layers.LSTMCell(2)]
        )
    ),
    "Bidirectional": two_directions,
    "TimeDistributed": lambda: layers.TimeDistributed(layers.LSTM(6)),
    "Sequential": a_sequential,
    "Functional": a_functional,
}


def make(case, rng):
    """A layer or model with random weights, and inputs for it."""
    layer = CASES[case]()
    shapes = {
        "cell": [(BATCH, FEATURES), [(BATCH, 6), (BATCH, 6)]],
        "TimeDistributed": [(BATCH, 2, TIME, FEATURES)],
        "Functional": [[(BATCH, TIME, FEATURES), (BATCH, TIME, FEATURES)]],
    }.get(case, [(BATCH, TIME, FEATURES)])
    inputs = keras.tree.map_shape_structure(
        lambda shape: rng.normal(size=shape).astype("float32"), shapes
    )
    if not layer.built:
        layer.build(shapes[0])
    return draw_weights(layer, rng), inputs


@pytest.mark.parametrize("case", CASES)
def test_the_outputs_stay_and_a_round_trip_gives_back_all(rng, case):
    builtin, inputs = make(case, rng)
    config, before = config_of(builtin), builtin.get_weights()
    scratch = to_scratch(builtin)
    assert type(scratch) is {
        layers.LSTM: ScratchLSTM,
        layers.LSTMCell: ScratchLSTMCell,
    }.get(type(builtin), type(builtin))
    assert count(scratch, BUILTIN) == 0
    assert count(scratch, SCRATCH) == count(builtin, BUILTIN) > 0
    assert names(scratch) == names(builtin)
    tolerance = 2e-3 if case == "mixed precision" else 1e-5
    expected = call(builtin, inputs)
    assert_same(call(scratch, inputs), expected, tolerance)

    again = to_builtin(scratch)
    assert count(again, SCRATCH) == 0
    assert_equal_weights(again, builtin)
    assert config_of(again) == config
    once_more = to_scratch(again)
    assert_equal_weights(once_more, scratch)
    assert config_of(once_more) == config_of(scratch)

    # The original stays as it was.
    assert count(builtin, SCRATCH) == 0
    assert config_of(builtin) == config
    for one, other in zip(builtin.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_gate_gets_its_part(rng):
    builtin, _ = make("layer", rng)
    cell = to_scratch(builtin).cell
    assert [weight.name for weight in cell.weights] == NAMES
    for fused, expected in zip(
        fuse(cell.get_weights()), builtin.get_weights(), strict=True
    ):
        np.testing.assert_array_equal(fused, expected)


@pytest.mark.parametrize("case", ["cell", "layer", "Bidirectional"])
def test_without_weights_the_arguments_alone_are_converted(case):
    builtin = CASES[case]()
    scratch = to_scratch(builtin)
    assert not scratch.built
    assert not scratch.weights
    again = to_builtin(scratch)
    assert config_of(again) == config_of(builtin)
    shape = (None, FEATURES) if case == "cell" else (None, TIME, FEATURES)
    again.build(shape)
    assert count(again, BUILTIN) == count(builtin, BUILTIN)


def test_a_model_without_inputs_is_converted_too(rng):
    builtin = keras.Sequential([layers.LSTM(6), layers.Dense(2)])
    scratch = to_scratch(builtin)
    assert not scratch.built
    assert isinstance(scratch.layers[0], ScratchLSTM)
    assert scratch(rng.normal(size=(BATCH, TIME, FEATURES))).shape == (BATCH, 2)


def test_what_is_of_the_wanted_kind_already_stays_so(rng):
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    both = keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            ScratchLSTM(6, kernel_regularizer={"f": "l2"}, return_sequences=True),
            layers.LSTM(3),
        ]
    )
    scratch = to_scratch(draw_weights(both, rng))
    assert count(scratch, SCRATCH) == 4
    assert config_of(scratch.layers[0]) == config_of(both.layers[0])
    assert_same(call(scratch, [x]), call(both, [x]))


def test_a_given_cell_becomes_the_layers_arguments(rng):
    cell = ScratchLSTMCell(6, activation="relu", recurrent_regularizer="l2")
    scratch = ScratchLSTM(cell=cell, return_sequences=True)
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    scratch(x)
    builtin = to_builtin(draw_weights(scratch, rng))
    assert type(builtin) is layers.LSTM
    assert_same(call(builtin, [x]), call(scratch, [x]))
    again = to_scratch(builtin)
    for one, other in zip(again.get_weights(), scratch.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


# --- what goes along ---------------------------------------------------------


def test_use_cudnn_goes_along():
    for use_cudnn in (False, "auto"):
        scratch = to_scratch(layers.LSTM(6, use_cudnn=use_cudnn))
        assert scratch.use_cudnn == use_cudnn
        assert to_builtin(scratch).use_cudnn == use_cudnn


@pytest.mark.parametrize("case", ["layer", "Sequential", "Functional"])
def test_what_is_frozen_stays_frozen(rng, case):
    builtin, _ = make(case, rng)
    lstms = [part for part in parts(builtin) if type(part) is layers.LSTM]
    builtin.trainable = False
    if case != "layer":
        builtin.trainable = True
        lstms[0].trainable = False
    lstms[-1].cell.trainable = True
    lstms[-1].cell.recurrent_kernel.trainable = False
    scratch = to_scratch(builtin)
    cells = [part for part in parts(scratch) if type(part) is ScratchLSTM]
    cell = next(part.cell for part in cells if part.name == lstms[-1].name)
    for weight in cell.weights:
        assert weight.trainable == (not weight.name.startswith("W_h"))
    again = to_builtin(scratch)
    assert_equal_weights(again, builtin)
    for one, other in zip(parts(again), parts(builtin), strict=True):
        assert one.trainable == other.trainable
    assert size(scratch.trainable_weights) == size(builtin.trainable_weights)


def size(weights):
    return sum(np.prod(weight.shape) for weight in weights)


def test_dropout_goes_on_with_the_same_random_numbers(rng):
    builtin = keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            layers.Dropout(0.4, seed=1),
            layers.LSTM(6, dropout=0.4, seed=2, return_sequences=True),
            layers.LSTM(6, recurrent_dropout=0.4, seed=3),
        ]
    )
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    builtin(x, training=True)
    scratch = to_scratch(builtin)
    again = to_builtin(scratch)
    expected = call(builtin, [x], training=True)
    assert_same(call(scratch, [x], training=True), expected)
    assert_same(call(again, [x], training=True), expected)


def test_states_go_along(rng):
    builtin = keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, TIME, FEATURES)),
            layers.GRU(3, stateful=True, return_sequences=True),
            layers.Bidirectional(layers.LSTM(3, stateful=True, return_sequences=True)),
            layers.RNN(layers.LSTMCell(6), stateful=True, return_sequences=True),
            layers.LSTM(6, stateful=True),
        ]
    )
    for one, other in zip(states(builtin), states(to_scratch(builtin)), strict=True):
        assert not numpy(one).any()
        one.assign(rng.normal(size=one.shape))
        assert not numpy(other).any()
    scratch = to_scratch(builtin)
    for model in (scratch, to_builtin(scratch)):
        for one, other in zip(states(builtin), states(model), strict=True):
            assert one is not other
            np.testing.assert_array_equal(numpy(one), numpy(other))


def states(model):
    found = [part.states for part in parts(model) if isinstance(part, layers.RNN)]
    assert len(keras.tree.flatten(found)) == 9
    return keras.tree.flatten(found)


def test_a_compiled_model_trains_on_and_the_original_stays(rng):
    x = rng.normal(size=(8, TIME, FEATURES)).astype("float32")
    y = rng.normal(size=(8, 2)).astype("float32")
    builtin = keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            layers.LSTM(
                6, kernel_regularizer="l2", recurrent_constraint="max_norm", name="lstm"
            ),
            layers.Dense(2),
        ]
    )
    draw_weights(builtin, rng)
    builtin.get_layer("lstm").cell.bias.trainable = False
    builtin.compile(
        keras.optimizers.SGD(0.5, momentum=0.9, global_clipnorm=1.0),
        "mse",
        metrics=["mae"],
    )
    scratch = to_scratch(builtin)
    again = to_builtin(scratch)
    before = builtin.get_weights()
    for model in (scratch, again):
        assert model.optimizer.get_config() == builtin.optimizer.get_config()
        assert len(model.trainable_variables) == (10 if model is scratch else 4)

    def fit(model):
        return model.fit(x, y, 4, epochs=3, shuffle=False, verbose=0).history

    ours = fit(scratch)
    for one, other in zip(builtin.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    theirs = fit(builtin)
    assert ours.keys() == theirs.keys() == {"loss", "mae"}
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    assert_same(call(scratch, [x]), call(builtin, [x]), 1e-4)


def test_what_a_layer_holds_beside_weights_goes_along(rng):
    normalize = layers.Normalization()
    normalize.adapt(rng.normal(3, 2, size=(8, TIME, FEATURES)))
    builtin = keras.Sequential(
        [keras.Input((TIME, FEATURES)), normalize, layers.LSTM(6)]
    )
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    assert_same(call(to_scratch(builtin), [x]), call(builtin, [x]))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has strings")
def test_a_vocabulary_goes_along():
    texts = np.array([["time travels"], ["the time traveller"]])
    vectorize = layers.TextVectorization(output_sequence_length=TIME)
    vectorize.adapt(texts)
    builtin = keras.Sequential(
        [
            keras.Input((1,), dtype="string"),
            vectorize,
            layers.Embedding(10, FEATURES),
            layers.LSTM(6),
        ]
    )
    scratch = to_scratch(builtin)
    assert scratch.layers[0].get_vocabulary() == vectorize.get_vocabulary()
    inputs = [ops.convert_to_tensor(texts)]
    assert_same(call(scratch, inputs), call(builtin, inputs))


class Twice(layers.Layer):
    """A layer of which Keras's serialization has never heard."""

    def call(self, x):
        return x * 2


def test_custom_layers_beside_it_need_not_be_registered(rng):
    builtin = keras.Sequential(
        [
            keras.Input((TIME, FEATURES)),
            layers.TimeDistributed(Twice()),
            layers.Lambda(lambda x: x + 1),
            layers.LSTM(6),
        ]
    )
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    expected = call(builtin, [x])
    assert_same(call(to_scratch(builtin), [x]), expected)


# --- arguments ---------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_regularizer": "l1", "bias_regularizer": "l2"},
        {"recurrent_regularizer": keras.regularizers.L1L2(0.1, 0.2)},
        {"kernel_constraint": keras.constraints.MaxNorm(0.5)},
        {"recurrent_constraint": keras.constraints.MinMaxNorm(0.2, 0.4, rate=0.5)},
        {"kernel_constraint": keras.constraints.UnitNorm(axis=[0])},
        {"bias_constraint": "non_neg", "kernel_constraint": "non_neg"},
    ],
    ids=label,
)
def test_regularizers_and_constraints_that_are_carried_over_mean_the_same(
    rng, arguments
):
    builtin = layers.LSTM(6, **arguments)
    builtin.build((None, TIME, FEATURES))
    scratch = to_scratch(draw_weights(builtin, rng))
    assert config_of(to_builtin(scratch)) == config_of(builtin)
    losses = [
        numpy(sum(layer.losses, start=ops.zeros(()))) for layer in (scratch, builtin)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    before = builtin.get_weights()
    for layer in (builtin, scratch):
        for weight in layer.weights:
            if weight.constraint is not None:
                weight.assign(weight.constraint(weight))
    after = builtin.get_weights()
    changed = not all(map(np.array_equal, before, after))
    assert changed == any("constraint" in argument for argument in arguments)
    for one, other in zip(fuse(scratch.cell.get_weights()), after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kernel_regularizer": keras.regularizers.OrthogonalRegularizer()}, "L2"),
        ({"kernel_regularizer": Twice}, "L2"),
        ({"recurrent_constraint": keras.constraints.MaxNorm(axis=1)}, "axis 0"),
        ({"kernel_constraint": keras.constraints.UnitNorm(axis=[0, 1])}, "axis 0"),
        ({"bias_constraint": "max_norm"}, "on a matrix MaxNorm"),
    ],
    ids=label,
)
def test_regularizers_and_constraints_across_gates_are_refused(arguments, expected):
    for make_layer, convert in ((layers.LSTM, to_scratch), (ScratchLSTM, to_builtin)):
        layer = make_layer(6, **arguments, name="lstm")
        with pytest.raises(ValueError, match=r"^`lstm/lstm_cell` has .* as ") as error:
            convert(layer)
        assert f"`{next(iter(arguments))}`" in str(error.value)
        assert expected in str(error.value)


def test_arguments_by_gate_go_back_if_all_gates_have_the_same():
    every = {gate: keras.regularizers.L2(0.1) for gate in "ifoc"}
    builtin = to_builtin(ScratchLSTM(6, kernel_regularizer=every))
    assert isinstance(builtin.kernel_regularizer, keras.regularizers.L2)
    for argument in ("kernel_regularizer", "bias_constraint"):
        value = {"f": "l2" if argument.endswith("regularizer") else "non_neg"}
        cell = ScratchLSTMCell(6, **{argument: value}, name="my_cell")
        with pytest.raises(ValueError, match=f"^`my_cell` has a `{argument}` that dif"):
            to_builtin(cell)


def test_initializers_by_gate_go_back_once_they_have_had_their_effect(rng):
    layer = ScratchLSTM(6, bias_initializer={"f": "ones"}, name="my_lstm")
    message = "^`my_lstm/lstm_cell` has a `bias_initializer` by gate and no weights yet"
    with pytest.raises(ValueError, match=message):
        to_builtin(layer)
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    layer(x)
    builtin = to_builtin(layer)
    assert_same(call(builtin, [x]), call(layer, [x]))
    assert isinstance(builtin.bias_initializer, keras.initializers.Zeros)


# --- what is refused ---------------------------------------------------------


class MyLSTM(layers.LSTM):
    pass


class MyLSTMCell(layers.LSTMCell):
    pass


class MyScratchLSTM(ScratchLSTM):
    pass


class MyScratchLSTMCell(ScratchLSTMCell):
    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


class OfTwoLayers(layers.Layer):
    """A layer that makes an LSTM of its own, of which its configuration is silent."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lstm = layers.LSTM(6)

    def call(self, x):
        return self.lstm(x)

    def compute_output_shape(self, shape):
        return shape[0], 6


class WithoutConfiguration(layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lstm = layers.LSTM(6)

    def call(self, x):
        return self.lstm(x)


def in_a_model(*middle):
    """A model with an LSTM that can be converted, and what is given."""
    first = layers.LSTM(FEATURES, return_sequences=True, name="first")
    return keras.Sequential([keras.Input((TIME, FEATURES)), first, *middle])


def shared_across_models():
    shared = layers.Dense(FEATURES, name="shared")
    inputs = keras.Input((TIME, FEATURES))
    inner = keras.Model(inputs, shared(inputs), name="inner")
    inputs = keras.Input((TIME, FEATURES))
    return keras.Model(inputs, layers.LSTM(6)(shared(inner(inputs))))


REFUSED = {
    "no layer": (lambda: "lstm", "`layer_or_model` is 'lstm'; expected a Keras layer"),
    "no LSTM": (
        lambda: layers.GRU(6, name="my_gru"),
        "`layer_or_model` is `my_gru`, a GRU without any `LSTM` or `LSTMCell`; expect",
    ),
    "ours": (
        lambda: ScratchLSTM(6, name="ours"),
        "`layer_or_model` is `ours`, a ScratchLSTM without any `LSTM` or `LSTMCell`",
    ),
    "a subclass": (
        lambda: in_a_model(MyLSTM(6, name="mine")),
        "`mine` is a MyLSTM, and what a subclass of LSTM changes cannot be carried",
    ),
    "a subclass of the cell": (
        lambda: in_a_model(layers.RNN(MyLSTMCell(6, name="mine"), name="rnn")),
        "`rnn/mine` is a MyLSTMCell, and what a subclass of LSTMCell changes cannot",
    ),
    "a subclassed model": (
        lambda: Subclassed(name="subclassed"),
        "`subclassed` cannot be copied by its configuration",
    ),
    "a layer that makes an LSTM": (
        lambda: in_a_model(OfTwoLayers(name="two")),
        "`two` cannot be copied by its configuration",
    ),
    "a layer without configuration": (
        lambda: in_a_model(WithoutConfiguration(lambda x: x, name="silent")),
        "`silent` cannot be copied by its configuration",
    ),
    "a layer of two models": (
        shared_across_models,
        "`shared` is in several models or wrappers at once",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_to_scratch_refuses(case):
    make_it, message = REFUSED[case]
    builtin = make_it()
    before = [] if case == "no layer" else builtin.get_weights()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        to_scratch(builtin)
    assert str(error.value).startswith(message)
    assert str(error.value).count("; expected ") == 1
    assert "\n" not in str(error.value)
    if case != "no layer":
        np.testing.assert_equal(builtin.get_weights(), before)


def frozen_gate():
    layer = ScratchLSTM(6, name="mine")
    layer.build((None, TIME, FEATURES))
    layer.cell.W_hf.trainable = False
    return layer


REFUSED_BACK = {
    "no LSTM of ours": (
        lambda: layers.LSTM(6, name="stock"),
        "`layer_or_model` is `stock`, a LSTM without any `ScratchLSTM` or `ScratchLSTM",
    ),
    "a cell of one's own": (
        lambda: ScratchLSTM(cell=MyScratchLSTMCell(6, name="coupled"), name="mine"),
        "`mine/coupled` is a MyScratchLSTMCell, and what a subclass of ScratchLSTMCell",
    ),
    "a subclass": (
        lambda: MyScratchLSTM(6, name="mine"),
        "`mine` is a MyScratchLSTM, and what a subclass of ScratchLSTM changes cannot",
    ),
    "time_major": (
        lambda: ScratchLSTM(6, time_major=True, name="mine"),
        "`mine` has `time_major` set, which the built-in LSTM does not have",
    ),
    "a frozen gate": (
        frozen_gate,
        "`mine/lstm_cell` has only W_hf frozen of its W_h*, which are one variable",
    ),
    "two dtype policies": (
        lambda: ScratchLSTM(cell=ScratchLSTMCell(6, dtype="bfloat16"), name="mine"),
        "`mine` has the dtype policy 'float32' and its cell 'bfloat16'; expected one",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BACK)
def test_what_to_builtin_refuses(case):
    make_it, message = REFUSED_BACK[case]
    layer = make_it()
    for refused in (layer, keras.Sequential([layer, layers.Dense(2)])):
        if "no LSTM" in case and refused is not layer:
            continue
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            to_builtin(refused)
        assert str(error.value).startswith(message)
        assert str(error.value).count("; expected ") == 1


def test_a_loss_that_keras_cannot_copy_is_refused(rng):
    def my_loss(y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred))

    builtin = in_a_model(layers.LSTM(6))
    builtin.compile("sgd", loss=my_loss)
    with pytest.raises(ValueError, match="` is compiled with what"):
        to_scratch(builtin)
    with keras.saving.custom_object_scope({"my_loss": my_loss}):
        scratch = to_scratch(builtin)
    assert scratch.loss is my_loss


# --- torch's layout ----------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("time_major", [False, True])
def test_torchs_lstm_comes_in_and_goes_out(rng, bias, time_major):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    theirs = torch.nn.LSTM(FEATURES, 6, bias=bias, batch_first=not time_major)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.tensor(rng.normal(0, 0.5, parameter.shape)))
    ours = from_torch(
        theirs.state_dict(),
        return_sequences=True,
        return_state=True,
        time_major=time_major,
    )
    x = rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
    h, c = rng.normal(size=(2, BATCH, 6)).astype("float32")
    x = x.swapaxes(0, 1) if time_major else x
    start = torch.tensor(h)[None], torch.tensor(c)[None]
    with torch.no_grad():
        outputs, (last_h, last_c) = theirs(torch.tensor(x), start)
    expected = [outputs.numpy(), last_h[0].numpy(), last_c[0].numpy()]
    assert_same(call(ours, [x], initial_state=[h, c]), expected)

    weights = to_torch(ours)
    again = torch.nn.LSTM(FEATURES, 6, bias=bias, batch_first=not time_major)
    again.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
    with torch.no_grad():
        outputs, _ = again(torch.tensor(x), start)
    assert_same([outputs.numpy()], expected[:1])
    assert list(weights) == list(theirs.state_dict())
    once_more = from_torch(weights)
    for one, other in zip(once_more.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def torch_weights(rng, units=6, suffix="_l0"):
    shapes = {
        "weight_ih": (4 * units, FEATURES),
        "weight_hh": (4 * units, units),
        "bias_ih": (4 * units,),
        "bias_hh": (4 * units,),
    }
    return {
        name + suffix: rng.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }


def test_torchs_biases_are_added_up(rng):
    weights = torch_weights(rng)
    cell = from_torch(weights).cell
    total = weights["bias_ih_l0"] + weights["bias_hh_l0"]
    b = dict(zip("ifco", np.split(total, 4), strict=True))  # torch: i, f, g, o
    for gate in "ifoc":
        np.testing.assert_array_equal(numpy(getattr(cell, f"b_{gate}")), b[gate])
    fused = np.concatenate(
        [numpy(getattr(cell, f"W_x{gate}")) for gate in "ifco"], axis=1
    )
    np.testing.assert_array_equal(fused.T, weights["weight_ih_l0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: 3, "`state_dict` is 3; expected a dict"),
        (lambda w: {}, "`state_dict` has the keys ; expected 'weight_ih_l0', "),
        (lambda w: w | torch_weights(w["rng"], suffix="_l1"), "'weight_ih_l1'"),
        (lambda w: w | torch_weights(w["rng"], suffix="_l0_reverse"), "_l0_reverse'"),
        (lambda w: w | {"weight_hr_l0": np.ones((2, 6))}, "'weight_hr_l0'; expected"),
        (lambda w: {k: v for k, v in w.items() if k != "bias_hh_l0"}, "has the keys"),
        (
            lambda w: w | {"weight_hh_l0": np.ones((24, 5))},
            "has weight_hh_l0 of shape (24, 5); expected (24, 6), for 6 units and 4 f",
        ),
        (
            lambda w: w | {"weight_ih_l0": np.ones((23, 4))},
            "has weight_ih_l0 of shape (23, 4); expected (20, 4)",
        ),
        (lambda w: w | {"weight_ih_l0": np.ones(())}, "has weight_ih_l0 of shape ()"),
        (lambda w: w | {"bias_hh_l0": np.ones(6)}, "has bias_hh_l0 of shape (6,); ex"),
    ],
)
def test_other_weights_of_torch_are_refused(rng, change, message):
    weights = change({**torch_weights(rng), "rng": rng})
    if isinstance(weights, dict):
        weights.pop("rng", None)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        from_torch(weights)
    assert str(error.value).startswith("`state_dict` ")
    assert str(error.value).count("; expected ") == 1


def test_what_torch_does_not_compute_is_refused():
    for layer, message in (
        (layers.LSTM(6), "; expected a `ScratchLSTM`."),
        (ScratchLSTM(6, name="mine"), "expected a layer that is built"),
        (ScratchLSTM(6, activation="relu"), "expected tanh as `activation`"),
        (ScratchLSTM(6, recurrent_activation="relu"), "expected sigmoid as `recurrent"),
        (ScratchLSTM(6, go_backwards=True), "expected a layer that reads forwards"),
        (ScratchLSTM(cell=MyScratchLSTMCell(6)), "expected a ScratchLSTMCell itself"),
        (MyScratchLSTM(6), "expected a ScratchLSTM itself"),
    ):
        if layer.name != "mine":
            layer.build((None, TIME, FEATURES))
        with pytest.raises(ValueError, match=re.escape(message)):
            to_torch(layer)
