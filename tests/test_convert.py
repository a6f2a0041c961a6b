import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import NAMES, fuse

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell
from keras_scratch_lstm.convert import from_torch, to_builtin, to_scratch, to_torch

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
    layer(*inputs)
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
    np.testing.assert_equal(call(again, inputs), expected)
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
    draw_weights(builtin, rng)
    first, second = rng.normal(size=(2, BATCH, TIME, FEATURES)).astype("float32")
    builtin(first)
    scratch = to_scratch(builtin)
    again = to_builtin(scratch)
    expected = call(builtin, [second])
    assert_same(call(scratch, [second]), expected)
    assert_same(call(again, [second]), expected)
    fresh = to_scratch(builtin)
    for layer in fresh.layers[::3]:
        layer.reset_state()
    assert not np.allclose(call(fresh, [second]), call(builtin, [second]))


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
    histories = []
    for model in (scratch, again, builtin):
        if model is builtin:
            for one, other in zip(builtin.get_weights(), before, strict=True):
                np.testing.assert_array_equal(one, other)
        assert model.optimizer.get_config() == builtin.optimizer.get_config()
        history = model.fit(x, y, batch_size=4, epochs=3, shuffle=False, verbose=0)
        histories.append(history.history)
    for history in histories[:2]:
        assert history.keys() == histories[2].keys() == {"loss", "mae"}
        for name in history:
            np.testing.assert_allclose(history[name], histories[2][name], rtol=1e-4)
    assert_same(call(scratch, [x]), call(builtin, [x]), 1e-4)
