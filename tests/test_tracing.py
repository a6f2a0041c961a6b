import gc
import os
import random
import re
import threading
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from reference import sigmoid, weights_of

from keras_scratch_lstm import (
    GateTrace,
    ScratchLSTM,
    ScratchLSTMCell,
    trace_gates,
)
from keras_scratch_lstm.tracing import replay
from keras_scratch_lstm.tracing import trace as trace_file
from keras_scratch_lstm.tracing.trace import ARRAYS

BATCH, TIME, FEATURES, UNITS = 5, 7, 3, 4
BACKEND = keras.backend.backend()
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def letters(cell):
    """The twelve weights by name, in float64, whichever the cell."""
    if isinstance(cell, ScratchLSTMCell):
        return weights_of(cell)
    fused = [ops.convert_to_numpy(weight).astype("float64") for weight in cell.weights]
    w = {}
    for letter, values in zip(("W_x", "W_h", "b_"), fused, strict=False):
        parts = np.split(values, 4, axis=-1)
        w |= {letter + gate: part for gate, part in zip("ifco", parts, strict=True)}
    return w


def numpy_trace(w, x, h=None, c=None, mask=None, backwards=False, peephole=None):
    """All six arrays of an LSTM, step by step in float64."""
    batch, time, _ = x.shape
    units = w["W_hi"].shape[0]
    x = x.astype("float64")
    h = np.zeros((batch, units)) if h is None else h.astype("float64")
    c = np.zeros((batch, units)) if c is None else c.astype("float64")
    trace = {name: np.full((batch, time, units), np.nan) for name in ARRAYS}
    for t in reversed(range(time)) if backwards else range(time):

        def z(gate, t=t, h=h):
            return (
                x[:, t] @ w[f"W_x{gate}"] + h @ w[f"W_h{gate}"] + w.get(f"b_{gate}", 0)
            )

        i, f, o, c_tilde = sigmoid(z("i")), sigmoid(z("f")), sigmoid(z("o")), None
        if peephole is not None:
            f = sigmoid(z("f") + c * peephole)
        c_tilde = np.tanh(z("c"))
        c_new = f * c + i * c_tilde
        h_new = o * np.tanh(c_new)
        kept = np.ones((batch, 1), bool) if mask is None else mask[:, t, None]
        for name, value in zip(ARRAYS, (i, f, o, c_tilde, c_new, h_new), strict=True):
            trace[name][:, t] = np.where(kept, value, np.nan)
        h, c = np.where(kept, h_new, h), np.where(kept, c_new, c)
    return trace


def assert_equal(trace, expected, **tolerance):
    for name in ARRAYS:
        np.testing.assert_allclose(
            getattr(trace, name), expected[name], **(tolerance or CLOSE), err_msg=name
        )


class PeepholeCell(ScratchLSTMCell):
    """Its forget gate looks at the memory."""

    def build(self, input_shape):
        super().build(input_shape)
        self.W_cf = self.add_weight(
            name="W_cf", shape=(self.units,), initializer="random_normal"
        )

    def gates(self, x, h, c):
        z = x @ self.W_xf + h @ self.W_hf + self.b_f + c * self.W_cf
        return super().gates(x, h, c)._replace(f=ops.sigmoid(z))


KINDS = {
    "LSTM": lambda **kwargs: keras.layers.LSTM(UNITS, **kwargs),
    "RNN(LSTMCell)": lambda **kwargs: keras.layers.RNN(
        keras.layers.LSTMCell(UNITS), **kwargs
    ),
    "RNN(ScratchLSTMCell)": lambda **kwargs: keras.layers.RNN(
        ScratchLSTMCell(UNITS), **kwargs
    ),
    "ScratchLSTM": lambda **kwargs: ScratchLSTM(UNITS, **kwargs),
    "own gates": lambda **kwargs: ScratchLSTM(cell=PeepholeCell(UNITS), **kwargs),
}
STOCK_AND_OURS = ["LSTM", "ScratchLSTM"]


def make(kind, **kwargs):
    keras.utils.set_random_seed(1)
    layer = KINDS[kind](**kwargs)
    layer.build((BATCH, TIME, FEATURES))
    return layer


def expect(layer, x, **kwargs):
    w = letters(layer.cell)
    return numpy_trace(
        w, x, backwards=layer.go_backwards, peephole=w.get("W_cf"), **kwargs
    )


@pytest.fixture
def x(rng):
    return rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")


@pytest.fixture(params=["kernel", "loop"])
def way(request, monkeypatch):
    """Both ways to have the gates, wherever the backend would take but one."""
    monkeypatch.setattr(replay, "_RECURRENCES", weakref.WeakKeyDictionary())
    if request.param == "loop":
        monkeypatch.setattr(replay, "_has_kernel", lambda cell: False)
    else:
        monkeypatch.setattr(
            replay.recurrence, "implementations", lambda *_: {"torch": no_way}
        )
    return request.param


def no_way(*arguments):
    raise NotImplementedError


# --- each kind of layer ------------------------------------------------------


@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_follows_the_equations(kind, go_backwards, x):
    layer = make(kind, go_backwards=go_backwards)
    trace = trace_gates(layer, x)
    assert_equal(trace, expect(layer, x))
    assert all(getattr(trace, name).dtype == "float32" for name in ARRAYS)
    assert trace.mask is None
    assert trace.backward is None
    assert trace.layer == layer.name


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_both_ways_follow_the_equations(kind, way, x, rng):
    layer = make(kind)
    assert_equal(trace_gates(layer, x), expect(layer, x))
    mask = rng.random((BATCH, TIME)) < 0.6
    inputs = keras.Input((TIME, FEATURES)), keras.Input((TIME,), dtype="bool")
    states = [np.float32(rng.normal(size=(BATCH, UNITS))) for _ in "hc"]
    outputs = layer(
        inputs[0],
        mask=inputs[1],
        initial_state=[keras.ops.convert_to_tensor(state) for state in states],
    )
    model = keras.Model(inputs, outputs)
    trace = trace_gates(model, [x, mask])
    assert_equal(trace, expect(layer, x, h=states[0], c=states[1], mask=mask))


@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_h_is_the_layers_own_output(kind, go_backwards, x):
    layer = make(kind, go_backwards=go_backwards, return_sequences=True)
    outputs = ops.convert_to_numpy(layer(x))
    if go_backwards:
        outputs = outputs[:, ::-1]
    np.testing.assert_allclose(trace_gates(layer, x).h, outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_without_bias_and_with_other_activations(kind, x):
    keras.utils.set_random_seed(2)
    layer = {"LSTM": keras.layers.LSTM, "ScratchLSTM": ScratchLSTM}[kind](
        UNITS,
        use_bias=False,
        activation="softsign",
        recurrent_activation="hard_sigmoid",
        return_sequences=True,
    )
    h = ops.convert_to_numpy(layer(x))
    trace = trace_gates(layer, x)
    np.testing.assert_allclose(trace.h, h, **CLOSE)
    np.testing.assert_allclose(trace.h, trace.o * trace.c / (1 + abs(trace.c)), **CLOSE)
    z = x[:, 0] @ letters(layer.cell)["W_xf"]
    np.testing.assert_allclose(trace.f[:, 0], np.clip(z / 6 + 0.5, 0, 1), **CLOSE)
    np.testing.assert_allclose(
        trace.c[:, 1:],
        trace.f[:, 1:] * trace.c[:, :-1] + (trace.i * trace.c_tilde)[:, 1:],
        **CLOSE,
    )


def test_a_cell_with_a_call_of_its_own_is_heard(x):
    class LeakyCell(ScratchLSTMCell):
        def call(self, inputs, states, training=False):
            h, (_, c) = super().call(inputs, states, training)
            return h, [h, 0.5 * c]

    layer = keras.layers.RNN(LeakyCell(UNITS), return_sequences=True)
    h = ops.convert_to_numpy(layer(x))
    trace = trace_gates(layer, x)
    np.testing.assert_allclose(trace.h, h, rtol=1e-5, atol=1e-6)
    first = 0.5 * trace.i[:, 0] * trace.c_tilde[:, 0]
    np.testing.assert_allclose(trace.c[:, 0], first, **CLOSE)


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_comes_out_as_float32(kind, policy, x, dtype_policy):
    dtype_policy(policy)
    layer = make(kind, return_sequences=True)
    outputs = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    trace = trace_gates(layer, x)
    assert all(getattr(trace, name).dtype == "float32" for name in ARRAYS)
    assert_equal(trace, expect(layer, x), rtol=0.05, atol=0.02)
    np.testing.assert_allclose(trace.h, outputs, rtol=0.05, atol=0.02)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 unless asked")
@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_float64_stays_float64(kind, x, dtype_policy):
    dtype_policy("float64")
    layer = make(kind)
    trace = trace_gates(layer, x)
    assert all(getattr(trace, name).dtype == "float64" for name in ARRAYS)
    assert_equal(trace, expect(layer, x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_nothing_is_dropped_out(kind, x):
    layer = make(kind, dropout=0.5, recurrent_dropout=0.5)
    assert_equal(trace_gates(layer, x), expect(layer, x))


# --- where the layer stands --------------------------------------------------


def embed(tokens, model):
    return ops.convert_to_numpy(model.get_layer("embedding")(tokens))


@pytest.fixture
def tokens(rng):
    return rng.integers(1, 9, (BATCH, TIME))


def sequential(*layers, **kwargs):
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((TIME,), dtype="int32"),
            keras.layers.Embedding(9, FEATURES, name="embedding", **kwargs),
            *layers,
            keras.layers.Dense(2),
        ],
    )


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_in_a_sequential_model(kind, tokens):
    model = sequential(KINDS[kind]())
    layer = model.layers[1]
    trace = trace_gates(model, tokens)
    assert_equal(trace, expect(layer, embed(tokens, model)))
    assert_equal(trace_gates(model, ops.convert_to_tensor(tokens)), vars(trace))
    assert_equal(trace_gates(model, tokens, layer), vars(trace))


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_any_layer_of_a_stack(kind, tokens):
    model = sequential(
        KINDS[kind](return_sequences=True, name="lower"), KINDS[kind](name="upper")
    )
    x = embed(tokens, model)
    lower, upper = model.layers[1:3]
    assert_equal(trace_gates(model, tokens, "lower"), expect(lower, x))
    above = expect(upper, ops.convert_to_numpy(lower(x)))
    assert_equal(trace_gates(model, tokens, "upper"), above)
    assert_equal(trace_gates(model, tokens, upper), above)


def test_in_a_nested_functional_model_with_several_inputs(x, rng):
    sequences = keras.Input((TIME, FEATURES), name="x")
    states = [keras.Input((UNITS,), name=name) for name in "hc"]
    inner = keras.Model(
        [sequences, *states],
        keras.layers.LSTM(UNITS, name="deep")(sequences, initial_state=states),
    )
    shift = keras.Input((1,), name="shift")
    outputs = inner([sequences + shift[:, None], *states])
    inputs = {"x": sequences, "h": states[0], "c": states[1], "shift": shift}
    model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
    h, c = (np.float32(rng.normal(size=(BATCH, UNITS))) for _ in "hc")
    s = np.float32(rng.normal(size=(BATCH, 1)))
    trace = trace_gates(model, {"x": x, "h": h, "c": c, "shift": s}, batch_size=2)
    layer = inner.get_layer("deep")
    assert_equal(trace, expect(layer, x + s[:, None], h=h, c=c))
    assert trace.layer == "deep"


class Subclassed(keras.Model):
    """Its LSTMs are in plain Python attributes, a list and a layer within a layer."""

    def __init__(self):
        super().__init__()
        self.stack = [
            keras.layers.LSTM(FEATURES, return_sequences=True, name="first"),
            ScratchLSTM(UNITS, name="second"),
        ]
        self.head = keras.layers.Dense(2)

    def call(self, inputs, training=False):
        for layer in self.stack:
            inputs = layer(inputs, training=training)
        return self.head(inputs)


def test_in_a_subclassed_model(x):
    keras.utils.set_random_seed(4)
    model = Subclassed()
    model(x)
    first, second = model.stack
    assert_equal(trace_gates(model, x, "first"), expect(first, x))
    first.return_sequences = True
    x_second = ops.convert_to_numpy(first(x))
    assert_equal(trace_gates(model, x, "second"), expect(second, x_second))


def test_of_a_shared_layer_the_first_call_is_traced(x):
    layer = make("ScratchLSTM", return_sequences=True)
    dense = keras.layers.Dense(FEATURES)
    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, layer(dense(layer(inputs))))
    assert_equal(trace_gates(model, x), expect(layer, x))


@pytest.mark.parametrize("kind", [*STOCK_AND_OURS, "RNN(ScratchLSTMCell)"])
@pytest.mark.parametrize("given", [False, True])
def test_both_directions_are_in_input_order(kind, given, x, rng):
    keras.utils.set_random_seed(5)
    layer = keras.layers.Bidirectional(KINDS[kind](return_sequences=True, name="lstm"))
    inputs = keras.Input((TIME, FEATURES))
    states = [np.float32(rng.normal(size=(BATCH, UNITS))) for _ in range(4)]
    kwargs = {}
    if given:
        kwargs["initial_state"] = [ops.convert_to_tensor(state) for state in states]
    else:
        states = [None] * 4
    model = keras.Model(inputs, layer(inputs, **kwargs))
    trace = trace_gates(model, x)
    forward, backward = layer.forward_layer, layer.backward_layer
    on, back = expect(forward, x, h=states[0], c=states[1]), None
    assert_equal(trace, on)
    back = expect(backward, x, h=states[2], c=states[3])
    assert_equal(trace.backward, back)
    assert (trace.layer, trace.backward.layer) == ("forward_lstm", "backward_lstm")
    h = ops.convert_to_numpy(layer(x, **kwargs))
    both = np.concatenate([trace.h, trace.backward.h], axis=-1)
    np.testing.assert_allclose(both, h, rtol=1e-5, atol=1e-6)
    # One of them alone.
    assert_equal(trace_gates(model, x, "backward_lstm"), back)
    assert_equal(trace_gates(model, x, forward), on)
    assert_equal(trace_gates(model, x, layer), on)


def test_the_right_half_of_the_bidirectional_layer_alone(x):
    layer = keras.layers.Bidirectional(
        keras.layers.GRU(UNITS), backward_layer=make("LSTM", go_backwards=True)
    )
    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    assert_equal(trace_gates(model, x), expect(layer.backward_layer, x))


def test_time_major(x):
    layer = ScratchLSTM(UNITS, time_major=True, return_sequences=True)
    swapped = np.swapaxes(x, 0, 1)
    h = ops.convert_to_numpy(layer(swapped))
    trace = trace_gates(layer, swapped, batch_size=2)
    assert_equal(trace, expect(layer, x))
    np.testing.assert_allclose(np.swapaxes(trace.h, 0, 1), h, rtol=1e-5, atol=1e-6)
    # Within a model, only the model knows where the samples are.
    inputs = keras.Input(batch_shape=(None, None, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    assert_equal(trace_gates(model, swapped, batch_size=2), expect(layer, x))


# --- masks -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_masked_steps_are_nan(kind, side, tokens, rng):
    lengths = rng.integers(1, TIME, BATCH)
    where = np.arange(TIME)[None]
    if side == "left":
        kept = where >= TIME - lengths[:, None]
    elif side == "right":
        kept = where < lengths[:, None]
    else:
        kept = rng.random((BATCH, TIME)) < 0.5
    tokens = np.where(kept, tokens, 0)
    model = sequential(KINDS[kind](return_sequences=True), mask_zero=True)
    layer = model.layers[1]
    trace = trace_gates(model, tokens)
    x = embed(tokens, model)
    assert_equal(trace, expect(layer, x, mask=kept))
    np.testing.assert_array_equal(trace.mask, kept)
    h = ops.convert_to_numpy(layer(x, mask=ops.convert_to_tensor(kept)))
    np.testing.assert_allclose(trace.h[kept], h[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", STOCK_AND_OURS)
def test_masks_in_both_directions(kind, tokens, rng):
    kept = rng.random((BATCH, TIME)) < 0.5
    tokens = np.where(kept, tokens, 0)
    layer = keras.layers.Bidirectional(KINDS[kind]())
    model = sequential(layer, mask_zero=True)
    trace, x = trace_gates(model, tokens), embed(tokens, model)
    for one, direction in (
        (trace, layer.forward_layer),
        (trace.backward, layer.backward_layer),
    ):
        np.testing.assert_array_equal(one.mask, kept)
        assert_equal(one, expect(direction, x, mask=kept))


# --- states ------------------------------------------------------------------


def stateful_model(kind):
    keras.utils.set_random_seed(6)
    return keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, TIME, FEATURES)),
            keras.layers.LSTM(FEATURES, stateful=True, return_sequences=True),
            KINDS[kind](stateful=True, return_sequences=True, name="traced"),
        ]
    )


@pytest.mark.parametrize("kind", [*STOCK_AND_OURS, "RNN(ScratchLSTMCell)"])
def test_a_stateful_model_keeps_its_states(kind, x):
    model = stateful_model(kind)
    lower, traced = model.layers
    model(x)  # states other than zero

    def states():
        return [ops.convert_to_numpy(s) for s in [*lower.states, *traced.states]]

    before = [np.copy(state) for state in states()]
    trace = trace_gates(model, x, "traced", batch_size=2)
    np.testing.assert_equal(states(), before)
    x_traced = ops.convert_to_numpy(lower(x))
    h, c = before[2:]
    assert_equal(trace, expect(traced, x_traced, h=h, c=c))
    with pytest.raises(
        ValueError, match=r"`inputs` has 2 samples, and 'lstm.*expected 5"
    ):
        trace_gates(model, x[:2], "traced")


def test_an_error_on_the_way_changes_no_state(x):
    class Fails(keras.layers.Layer):
        def call(self, inputs):
            if self.built and self.fails:
                raise RuntimeError("on the way")
            return inputs

    fails = Fails()
    fails.fails = False
    lower = keras.layers.LSTM(FEATURES, stateful=True, return_sequences=True)
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(BATCH, TIME, FEATURES)),
            lower,
            fails,
            keras.layers.LSTM(UNITS, name="traced"),
        ]
    )
    fails.fails = True
    with pytest.raises(RuntimeError, match="on the way"):
        trace_gates(model, x, "traced")
    assert all(np.all(ops.convert_to_numpy(state) == 0) for state in lower.states)
    assert "call" not in vars(model.get_layer("traced"))
    fails.fails = False
    trace_gates(model, x, "traced")


def test_a_trace_leaves_nothing_behind(x):
    counter = keras.layers.Dropout(0.5, seed=1)
    lstm = keras.layers.LSTM(UNITS, dropout=0.5, name="lstm")
    inputs = keras.Input((TIME, FEATURES))
    # It drops out even where nothing is trained.
    model = keras.Model(inputs, lstm(counter(inputs, training=True)))
    state = counter.seed_generator.state

    def look():
        return (
            ops.convert_to_numpy(state).tolist(),
            [ops.convert_to_numpy(weight).tolist() for weight in model.variables],
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002, it must stay
        )

    before, attributes = look(), sorted(vars(lstm))
    trace_gates(model, x)
    assert look() == before
    assert sorted(vars(lstm)) == attributes


def test_a_trace_takes_no_layers_name(x):
    def number():
        return int(ScratchLSTM(1).name.removeprefix("scratch_lstm").strip("_") or 0)

    before = number()
    trace_gates(make("LSTM", name="lstm"), x)
    assert number() == before + 1


def test_new_weights_are_seen(x):
    for kind in STOCK_AND_OURS:
        layer = make(kind)
        trace_gates(layer, x)
        layer.set_weights([2 * weight for weight in layer.get_weights()])
        assert_equal(trace_gates(layer, x), expect(layer, x))


def test_a_layer_is_not_kept_alive(x):
    layer = make("ScratchLSTM")
    trace_gates(layer, x)
    dead = weakref.ref(layer)
    del layer
    gc.collect()
    assert dead() is None


def test_traces_from_several_threads_are_the_serial_ones(x, rng):
    model = sequential(
        keras.layers.LSTM(UNITS, return_sequences=True), ScratchLSTM(UNITS)
    )
    inputs = [rng.integers(1, 9, (BATCH, TIME)) for _ in range(4)]
    name = model.layers[2].name
    expected = [trace_gates(model, tokens, name) for tokens in inputs]
    outputs = [ops.convert_to_numpy(model(tokens)) for tokens in inputs]
    traces, predicted, errors = {}, {}, []

    def in_thread(work, results, index):
        try:
            results[index] = [work(inputs[index]) for _ in range(2)]
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=in_thread, args=(work, results, index))
        for index in range(len(inputs))
        for work, results in (
            (lambda tokens: trace_gates(model, tokens, name), traces),
            (lambda tokens: ops.convert_to_numpy(model(tokens)), predicted),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for index, one in enumerate(expected):
        for trace in traces[index]:
            assert_equal(trace, vars(one), rtol=1e-6, atol=1e-7)
        for output in predicted[index]:
            np.testing.assert_allclose(output, outputs[index], rtol=1e-5, atol=1e-6)


# --- in parts ----------------------------------------------------------------


@pytest.mark.parametrize("go_backwards", [False, True])
def test_parts_make_the_same_whole(go_backwards, way, tokens, monkeypatch):
    tokens[0, :3] = 0  # masked
    model = sequential(ScratchLSTM(UNITS, go_backwards=go_backwards), mask_zero=True)
    whole = trace_gates(model, tokens)
    monkeypatch.setattr(replay, "_NUMBERS_AT_ONCE", 2 * UNITS * 2)  # two steps of two
    parts = trace_gates(model, tokens, batch_size=2)
    np.testing.assert_array_equal(parts.mask, whole.mask)
    assert_equal(parts, vars(whole), rtol=1e-6, atol=1e-7)


def test_samples_that_become_several_rows(rng, way):
    """A model that reads each sentence of a document."""
    x = rng.normal(size=(BATCH, 2, TIME, FEATURES)).astype("float32")
    inputs = keras.Input((2, TIME, FEATURES))
    layer = keras.layers.LSTM(UNITS)
    model = keras.Model(inputs, layer(ops.reshape(inputs, (-1, TIME, FEATURES))))
    expected = expect(layer, x.reshape(-1, TIME, FEATURES))
    assert_equal(trace_gates(model, x, batch_size=2), expected)


def test_batches_that_come_out_of_different_lengths(tokens):
    class UntilTheLast(keras.layers.Layer):
        """As many steps as the longest of the batch has."""

        def call(self, inputs):
            longest = int(ops.max(ops.sum(ops.cast(inputs > 0, "int32"), axis=1)))
            return inputs[:, :longest]

    class Ragged(keras.Model):
        def __init__(self):
            super().__init__()
            self.cut = UntilTheLast()
            self.embedding = keras.layers.Embedding(9, FEATURES)
            self.lstm = keras.layers.LSTM(UNITS)

        def call(self, inputs):
            return self.lstm(self.embedding(self.cut(inputs)))

    model = Ragged()
    model(tokens)
    tokens[:2, 3:] = 0
    with pytest.raises(
        ValueError, match=r"`inputs` reach 'lstm.*a number of steps that changes"
    ):
        trace_gates(model, tokens, batch_size=2)
    assert trace_gates(model, tokens).h.shape == (BATCH, TIME, UNITS)


# --- what cannot be traced ---------------------------------------------------


def refuse(message, *arguments, **kwargs):
    with pytest.raises(ValueError, match=message) as error:
        trace_gates(*arguments, **kwargs)
    assert "\n" not in str(error.value)


def test_which_layer_is_said(tokens):
    stack = sequential(
        keras.layers.LSTM(2, return_sequences=True, name="lower"),
        keras.layers.Bidirectional(ScratchLSTM(2, name="lstm"), name="upper"),
    )
    candidates = "expected one of 'lower', 'upper'."
    refuse(f"`layer` is None, and '.*' has 2 LSTMs; {candidates}", stack, tokens)
    refuse(
        f"`layer` is 'other', which is no LSTM of .*{candidates}",
        stack,
        tokens,
        "other",
    )
    dense = stack.layers[-1]
    refuse(f"`layer` is '{dense.name}', which is no", stack, tokens, dense)
    refuse("`layer` is 3, which is no LSTM", stack, tokens, 3)
    without = sequential(keras.layers.GRU(2))
    refuse("`model_or_layer` is '.*', which has no LSTM; expected", without, tokens)
    refuse(
        "`model_or_layer` is 'lstm'; expected a Keras model or layer", "lstm", tokens
    )


def test_a_name_that_two_layers_have(x):
    def branch(inputs):
        inner_inputs = keras.Input((TIME, FEATURES))
        outputs = keras.layers.LSTM(2, name="same")(inner_inputs)
        return keras.Model(inner_inputs, outputs)(inputs)

    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, branch(inputs) + branch(inputs))
    refuse("`layer` is 'same', the name of 2 LSTMs of", model, x, "same")
    layer = model.layers[2].get_layer("same")
    assert_equal(trace_gates(model, x, layer), expect(layer, x))


def test_what_is_not_built(x):
    refuse(
        "`model_or_layer` is 'seq.*not built yet",
        keras.Sequential([KINDS["LSTM"]()]),
        x,
    )
    refuse(
        "`model_or_layer` is 'sequential.*not built yet",
        keras.Sequential([make("LSTM")]),
        x,
    )
    refuse("`model_or_layer` is 'lstm.*not built yet", KINDS["LSTM"](), x)


def test_a_subclass_of_the_stock_cell_is_refused(x):
    class OwnCell(keras.layers.LSTMCell):
        pass

    layer = keras.layers.RNN(OwnCell(2))
    layer(x)
    refuse("whose cell is of OwnCell, a subclass of `keras.layers.LSTMCell`", layer, x)


def test_a_layer_that_is_not_called(x):
    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.lstm = make("LSTM", name="unused")
            self.head = keras.layers.Dense(1)

        def call(self, inputs):
            return self.head(inputs)

    model = Unused()
    model(x)
    refuse("`layer` is 'unused', which 'unused.*' does not call", model, x)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles nothing unless asked")
def test_a_layer_in_a_compiled_part(x):
    class Compiled(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.lstm = make("LSTM", name="hidden")

        def call(self, inputs):
            return ops.vectorized_map(lambda one: self.lstm(one[None])[0], inputs)

    layer = Compiled()
    layer(x)
    refuse(
        "`layer` is 'hidden', which is called where its inputs can't be seen", layer, x
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            np.zeros((0, TIME, FEATURES)),
            r"`inputs` has the shape \(0, 7, 3\); expected",
        ),
        (3.0, r"`inputs` has the shape \(\); expected arrays of as many samples"),
        (
            [np.zeros((2, 3)), np.zeros((3, 3))],
            r"the shapes \(2, 3\), \(3, 3\); expected",
        ),
    ],
    ids=["none", "number", "uneven"],
)
def test_inputs_that_are_no_samples(inputs, message):
    refuse(message, make("LSTM"), inputs)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "3", True, None])
def test_wrong_batch_size(batch_size, x):
    message = f"`batch_size` is {batch_size!r}; expected a positive integer"
    refuse(message, make("LSTM"), x, batch_size=batch_size)


# --- GateTrace ---------------------------------------------------------------


@pytest.fixture
def trace(rng):
    shape = 2, 3, 4
    arrays = {name: rng.random(shape).astype("float32") for name in ARRAYS}
    return GateTrace(**arrays, layer="lstm")


def test_saturation_by_hand(trace):
    trace.f[:] = 0.5
    trace.f[0, :, 0] = [0.05, 0.95, 0.99]
    trace.f[1, :, 0] = [0.1, 0.9, 0.0]  # at the bound is not beyond it
    left, right = trace.saturation()["f"]
    np.testing.assert_allclose(left, [2 / 6, 0, 0, 0])
    np.testing.assert_allclose(right, [2 / 6, 0, 0, 0])
    assert list(trace.saturation()) == ["i", "f", "o"]
    assert trace.saturation()["o"].left.shape == (4,)


def test_saturation_counts_no_masked_step(trace):
    trace.i[:] = 0.95
    trace.i[1, 2] = np.nan
    mask = np.array([[True] * 3, [True, True, False]])
    masked = GateTrace(**{name: getattr(trace, name) for name in ARRAYS}, mask=mask)
    np.testing.assert_array_equal(masked.saturation()["i"].right, 1)
    mask[:] = False
    assert np.isnan(masked.saturation()["i"].right).all()


def test_a_row_for_each_number(trace):
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = trace.to_dataframe(tokens=["abc", ["x", "", "<unk>"]])
    assert list(frame) == ["sample", "step", "token", "unit", "gate", "value"]
    assert len(frame) == 2 * 3 * 4 * 6
    for name in ARRAYS:
        one = frame[frame.gate == name].set_index(["sample", "step", "unit"]).value
        values = getattr(trace, name)
        assert all(one[index] == values[index] for index in np.ndindex(values.shape))
    tokens = frame.drop_duplicates(["sample", "step"]).token.tolist()
    assert tokens == ["a", "b", "c", "x", "", "<unk>"]
    bare = trace.to_dataframe()
    assert bare.token.isna().all()
    pd.testing.assert_frame_equal(
        bare.drop(columns="token"), frame.drop(columns="token")
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["abc"], "`tokens` has 1 samples; expected 2, each with its 3 tokens"),
        (["abc", "ab"], "`tokens` has 2 tokens; expected 3, one for each step"),
        (["abc", 3], "`tokens` is 3; expected a string or a list of 3 strings"),
    ],
    ids=str,
)
def test_wrong_tokens(tokens, message, trace):
    pytest.importorskip("pandas", reason="pandas is not installed")
    with pytest.raises(ValueError, match=message):
        trace.to_dataframe(tokens)


def test_without_pandas_it_is_said(trace, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="`to_dataframe` needs pandas: run `pip inst"):
        trace.to_dataframe()


def test_repr_is_short(trace):
    assert repr(trace) == "GateTrace(layer='lstm', batch=2, time=3, units=4)"
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    more = GateTrace(**arrays, mask=np.ones((2, 3), bool), backward=trace)
    expected = "GateTrace(layer='', batch=2, time=3, units=4, masked, backward=…)"
    assert repr(more) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_trace_is_the_same_when_loaded(dtype, trace, tmp_path):
    arrays = {name: getattr(trace, name).astype(dtype) for name in ARRAYS}
    mask = np.array([[True, False, True]] * 2)
    saved = GateTrace(**arrays, mask=mask, layer="fôrward", backward=trace)
    path = tmp_path / "trace.npz"
    path.write_bytes(b"what was there before")
    saved.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
    loaded = GateTrace.load(path)
    for one, other in ((saved, loaded), (saved.backward, loaded.backward)):
        for name in (*ARRAYS, "mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.layer == other.layer
        assert one.i.dtype == other.i.dtype
    assert loaded.backward.backward is None


def test_a_file_is_for_those_whom_any_new_file_is_for(trace, tmp_path, monkeypatch):
    path, plain = tmp_path / "trace.npz", tmp_path / "plain"
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            # It is that of all threads, so it is left alone even for a moment.
            patch.setattr(os, "umask", None)
            trace.save(path)
        plain.touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_file_is_written_whole_or_not_at_all(trace, tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    trace.save(path)
    before = path.read_bytes()

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(trace_file.np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        trace.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        GateTrace.load(tmp_path / "none.npz")


def broken_files(trace, folder, rng):
    path = folder / "whole.npz"
    trace.save(path)
    whole = path.read_bytes()
    arrays = {"format": np.array(trace_file._FORMAT), **trace._to_arrays("")}
    yield "empty", b""
    yield "text", b"no trace at all"
    for length in rng.integers(1, len(whole), 5):
        yield f"cut at {length}", whole[:length]

    def changed(**changes):
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return path.read_bytes()

    yield "other format", changed(format=np.array("other"))
    yield "no format", changed(format=None)
    yield "no gate", changed(f=None)
    yield "no layer", changed(layer=None)
    yield "other shape", changed(f=trace.f[:, :2])
    yield "two axes", changed(**dict.fromkeys(ARRAYS, trace.f[0]))
    yield "integers", changed(f=trace.f.astype(int))
    yield "strings", changed(f=trace.f.astype(str))
    yield "odd mask", changed(mask=np.ones((2, 2), bool))
    yield "half of a backward trace", changed(backward_i=trace.i)
    yield "pickle", changed(f=np.array([print], dtype=object))
    np.save(path.with_suffix(".npy"), trace.f)
    yield "one array", path.with_suffix(".npy").read_bytes()


def load_or_error(path):
    try:
        return GateTrace.load(path), ""
    except ValueError as error:
        return None, str(error)


def test_damaged_and_foreign_files_are_refused(trace, tmp_path, rng):
    path = tmp_path / "broken.npz"
    for what, content in list(broken_files(trace, tmp_path, rng)):
        path.write_bytes(content)
        loaded, error = load_or_error(path)
        assert loaded is None, what
        assert re.fullmatch(rf"`path` is '{path}', which is damaged or .*\.", error), (
            what
        )


def test_flipped_bytes_are_noticed(trace, tmp_path, rng):
    path = tmp_path / "trace.npz"
    trace.save(path)
    whole = path.read_bytes()
    for position in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        loaded, error = load_or_error(path)
        if loaded is None:
            assert error.startswith("`path` is ")
        else:  # a byte that means nothing, such as one of a date
            np.testing.assert_array_equal(loaded.c, trace.c)


def test_a_packed_bomb_is_not_unpacked(trace, tmp_path):
    path = tmp_path / "bomb.npz"
    arrays = trace._to_arrays("") | {"f": np.zeros((2, 3, 10**6), "float32")}
    np.savez_compressed(path, format=np.array(trace_file._FORMAT), **arrays)
    assert path.stat().st_size < 10**6
    loaded, error = load_or_error(path)
    assert loaded is None
    assert "damaged or no gate trace" in error
