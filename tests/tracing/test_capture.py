import random

import keras
import numpy as np
import pytest
from keras import ops
from models import (
    BATCH,
    FEATURES,
    LAYERS,
    TIME,
    UNITS,
    assert_close,
    check_error,
    embed,
    make,
    numpy_trace,
    sequential,
)
from reference import label

from keras_scratch_lstm import ScratchLSTM, trace_gates
from keras_scratch_lstm.observing.models import find_all

BACKEND = keras.backend.backend()
BOTH = pytest.mark.parametrize("kind", ["LSTM", "ScratchLSTM"])


# --- models ------------------------------------------------------------------


@BOTH
def test_layers_of_a_stack(kind, tokens):
    model = sequential(
        LAYERS[kind](return_sequences=True, name="lower"), LAYERS[kind](name="upper")
    )
    _, lower, upper, _ = model.layers
    x = embed(tokens, model)
    expected = numpy_trace(lower, x)
    for layer in ("lower", lower, -2):
        assert_close(trace_gates(model, tokens, layer=layer), expected)
    expected = numpy_trace(upper, ops.convert_to_numpy(lower(x)))
    assert_close(trace_gates(model, tokens, layer=np.int64(1)), expected)
    assert find_all(model) == [lower, upper]


def test_nested_functional_model_with_several_inputs(x, states):
    sequences = keras.Input((TIME, FEATURES), name="x")
    h, c = (keras.Input((UNITS,), name=name) for name in "hc")
    layer = keras.layers.LSTM(UNITS, name="deep")
    inner = keras.Model([sequences, h, c], layer(sequences, initial_state=[h, c]))
    shift = keras.Input((1,), name="shift")
    inputs = {"x": sequences, "h": h, "c": c, "shift": shift}
    model = keras.Model(inputs, inner([sequences + shift[:, None], h, c]))
    h, c, s, _ = states
    inputs = {"x": x, "h": h, "c": c, "shift": s[:, :1]}
    trace = trace_gates(model, inputs, batch_size=2)
    assert_close(trace, numpy_trace(layer, x + s[:, None, :1], h=h, c=c))
    assert trace.layer == "deep"


class Subclassed(keras.Model):
    """Calls its first LSTM twice and its last one never."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.LSTM(FEATURES, return_sequences=True, name="first")
        self.second = ScratchLSTM(UNITS, name="second")
        self.unused = make("LSTM", name="unused")

    def call(self, inputs, training=False):
        return self.second(self.first(self.first(inputs)))


def test_subclassed_model(x):
    model = Subclassed()
    model(x)
    assert_close(trace_gates(model, x, layer="first"), numpy_trace(model.first, x))
    x_second = ops.convert_to_numpy(model.first(model.first(x)))
    expected = numpy_trace(model.second, x_second)
    assert_close(trace_gates(model, x, layer="second"), expected)
    match = "must be called in the model's forward pass.*'unused'"
    check_error(match, model, x, "unused")


def test_samples_folded_into_several_rows(rng):
    """A model that reads each sentence of a document."""
    x = rng.normal(size=(BATCH, 2, TIME, FEATURES)).astype("float32")
    for fixed in (None, BATCH - 2):
        inputs = keras.Input(batch_shape=(fixed, 2, TIME, FEATURES))
        layer = keras.layers.LSTM(UNITS)
        model = keras.Model(inputs, layer(ops.reshape(inputs, (-1, TIME, FEATURES))))
        expected = numpy_trace(layer, x.reshape(-1, TIME, FEATURES))
        assert_close(trace_gates(model, x, batch_size=2), expected)


# --- states and fixed shapes -------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "samples"),
    [("LSTM", BATCH), ("ScratchLSTM", 1)],
)
def test_stateful_model_starts_from_its_states_and_keeps_them(kind, samples, x):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, TIME, FEATURES)),
            keras.layers.LSTM(FEATURES, stateful=True, return_sequences=True),
            LAYERS[kind](stateful=True, return_sequences=True, name="traced"),
        ]
    )
    lower, traced = model.layers
    model(x)  # states other than zero
    states = [*lower.states, *traced.states]
    before = [ops.convert_to_numpy(state).copy() for state in states]
    trace = trace_gates(model, x[:samples], layer="traced", batch_size=2)
    np.testing.assert_equal(list(map(ops.convert_to_numpy, states)), before)
    x_traced = ops.convert_to_numpy(lower(x))[:samples]
    h, c = (state[:samples] for state in before[2:])
    assert_close(trace, numpy_trace(traced, x_traced, h=h, c=c))
    many = np.concatenate([x, x])
    check_error(r"`inputs` must have at most 5 .* Received: 10", model, many, "traced")


@pytest.mark.parametrize(
    ("kind", "stateful", "mask_zero", "time"),
    [
        ("LSTM", False, True, None),
        ("LSTM", False, False, 4),
        ("ScratchLSTM", False, True, 4 * TIME),
        ("ScratchLSTM", True, True, 4),
        ("LSTM", True, False, 4 * TIME),
    ],
)
def test_fixed_batch_shape(kind, stateful, mask_zero, time, tokens):
    layer = LAYERS[kind](stateful=stateful, return_sequences=True)
    model = sequential(layer, mask_zero=mask_zero, batch_size=BATCH + 3, time=time)
    tokens[:, 2:4] = 0
    # More samples than the batch size, unless each has a state.
    inputs = np.concatenate([tokens] * (1 if stateful else 3))
    mask = inputs != 0 if mask_zero else None
    expected = numpy_trace(layer, embed(inputs, model), mask=mask)
    assert_close(trace_gates(model, inputs), expected)


def test_error_in_the_forward_pass_changes_no_state(x):
    class Fails(keras.layers.Layer):
        fails = False

        def call(self, inputs):
            if self.fails:
                raise RuntimeError("before the LSTM")
            return inputs

    fails = Fails()
    lower = keras.layers.LSTM(FEATURES, stateful=True, return_sequences=True)
    traced = keras.layers.LSTM(UNITS, name="traced")
    inputs = keras.Input(batch_shape=(BATCH, TIME, FEATURES))
    model = keras.Model(inputs, traced(fails(lower(inputs))))
    fails.fails = True
    with pytest.raises(RuntimeError, match="before the LSTM"):
        trace_gates(model, x, layer="traced")
    assert not any(ops.convert_to_numpy(state).any() for state in lower.states)
    fails.fails = False
    trace = trace_gates(model, x, layer=1)
    assert_close(trace, numpy_trace(traced, ops.convert_to_numpy(lower(x))))


def test_layers_after_the_lstm_may_reject_another_length(x):
    inputs = keras.Input((TIME + 2, FEATURES))
    lstm = keras.layers.LSTM(UNITS, return_sequences=True)
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(lstm(inputs)))
    trace = trace_gates(keras.Model(inputs, outputs), x)
    assert_close(trace, numpy_trace(lstm, x))


def test_trace_has_no_side_effects(x):
    dropout = keras.layers.Dropout(0.5, seed=1)
    lstm = keras.layers.LSTM(UNITS, dropout=0.5, name="lstm")
    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, lstm(dropout(inputs, training=True)))

    def observe():
        return (
            ops.convert_to_numpy(dropout.seed_generator.state).tolist(),
            [ops.convert_to_numpy(weight).tolist() for weight in model.variables],
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002, it must not change
            sorted(vars(lstm)),
        )

    trace_gates(model, x)  # compiles the loop, which the layer keeps
    keras.backend.clear_session()  # names start from "scratch_lstm"
    before = observe()
    trace_gates(model, x)
    assert observe() == before
    assert ScratchLSTM(1).name == "scratch_lstm"


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "received"),
    [
        (None, "None"),
        ("middle", "'middle'"),
        (keras.layers.Dense(1, name="other"), "other"),
        (["lower"], r"\['lower'\]"),
    ],
    ids=str,
)
@pytest.mark.one_backend
def test_invalid_layer(layer, received, tokens):
    lower = keras.layers.LSTM(2, return_sequences=True, name="lower")
    upper = keras.layers.Bidirectional(ScratchLSTM(2, name="lstm"), name="upper")
    match = rf"Pass `layer=` to choose one of: 'lower', 'upper'\. .*layer={received}$"
    check_error(match, sequential(lower, upper), tokens, layer)


class CustomCell(keras.layers.LSTMCell):
    pass


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (None, "`model` must be a Keras model or layer, or the path of a"),
        (keras.Sequential(name="a"), "must be or contain a `ScratchLSTM`, .*: 'a'"),
        (keras.layers.LSTM(2), r"must be built\. .* on data, or add `keras.Input`"),
        (
            keras.layers.RNN(CustomCell(2), name="a"),
            "Received: 'a' with a 'CustomCell'",
        ),
    ],
    ids=label,
)
def test_invalid_model(model, match, x):
    check_error(match, model, x)


def test_ambiguous_layer_name(x):
    def branch(inputs):
        inner_inputs = keras.Input((TIME, FEATURES))
        outputs = keras.layers.LSTM(2, name="same")(inner_inputs)
        return keras.Model(inner_inputs, outputs)(inputs)

    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, branch(inputs) + branch(inputs))
    check_error("2 LSTMs of 'functional.*' have the same name", model, x, "same")
    assert_close(trace_gates(model, x, layer=1), numpy_trace(find_all(model)[1], x))


@pytest.mark.skipif(
    BACKEND not in ("tensorflow", "jax"), reason="the backend does not compile"
)
def test_layer_in_compiled_code(x):
    class Compiled(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.lstm = make("LSTM", name="inner")

        def call(self, inputs):
            return ops.vectorized_map(lambda one: self.lstm(one[None])[0], inputs)

    layer = Compiled()
    layer(x)
    check_error("outside of compiled or vectorized code.*'inner'", layer, x)


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"batches": True}], ids=str)
def test_invalid_batch_size(given, x):
    match = f"`{next(iter(given))}` must be a positive integer"
    check_error(match, make("LSTM"), x, **given)
