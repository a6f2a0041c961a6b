import random

import keras
import numpy as np
import pytest
from keras import ops
from trace_reference import (
    BATCH,
    FEATURES,
    LAYERS,
    TIME,
    UNITS,
    assert_close,
    embed,
    make,
    numpy_trace,
    sequential,
)

from keras_scratch_lstm import ScratchLSTM, trace_gates
from keras_scratch_lstm.tracing.capture import find_all

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
    for layer in ("lower", lower, 0, -2):
        assert_close(trace_gates(model, tokens, layer), expected)
    expected = numpy_trace(upper, ops.convert_to_numpy(lower(x)))
    for layer in ("upper", upper, np.int64(1), -1):
        assert_close(trace_gates(model, tokens, layer), expected)
    assert find_all(model) == [lower, upper]


def test_nested_functional_model_with_several_inputs(x, states):
    sequences = keras.Input((TIME, FEATURES), name="x")
    state_inputs = [keras.Input((UNITS,), name=name) for name in "hc"]
    inner = keras.Model(
        [sequences, *state_inputs],
        keras.layers.LSTM(UNITS, name="deep")(sequences, initial_state=state_inputs),
    )
    shift = keras.Input((1,), name="shift")
    outputs = inner([sequences + shift[:, None], *state_inputs])
    h, c = state_inputs
    inputs = {"x": sequences, "h": h, "c": c, "shift": shift}
    model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
    h, c = states[:2]
    s = states[2][:, :1]
    trace = trace_gates(model, {"x": x, "h": h, "c": c, "shift": s}, batch_size=2)
    layer = inner.get_layer("deep")
    assert_close(trace, numpy_trace(layer, x + s[:, None], h=h, c=c))
    assert trace.layer == "deep"


def test_subclassed_model(x):
    class Subclassed(keras.Model):
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

    model = Subclassed()
    model(x)
    first, second = model.stack
    assert_close(trace_gates(model, x, "first"), numpy_trace(first, x))
    x_second = ops.convert_to_numpy(first(x))
    assert_close(trace_gates(model, x, "second"), numpy_trace(second, x_second))


def test_first_call_of_a_shared_layer_is_traced(x):
    layer = make("ScratchLSTM", return_sequences=True)
    dense = keras.layers.Dense(FEATURES)
    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, layer(dense(layer(inputs))))
    assert_close(trace_gates(model, x), numpy_trace(layer, x))


def test_samples_folded_into_several_rows(rng):
    """A model that reads each sentence of a document."""
    x = rng.normal(size=(BATCH, 2, TIME, FEATURES)).astype("float32")
    for fixed in (None, BATCH - 2, BATCH + 2):
        inputs = keras.Input(batch_shape=(fixed, 2, TIME, FEATURES))
        layer = keras.layers.LSTM(UNITS)
        model = keras.Model(inputs, layer(ops.reshape(inputs, (-1, TIME, FEATURES))))
        expected = numpy_trace(layer, x.reshape(-1, TIME, FEATURES))
        assert_close(trace_gates(model, x, batch_size=2), expected)


def test_path_of_a_keras_file(tokens, tmp_path):
    model = sequential(LAYERS["ScratchLSTM"]())
    model.save(tmp_path / "model.keras")
    expected = numpy_trace(model.layers[1], embed(tokens, model))
    for path in (tmp_path / "model.keras", str(tmp_path / "model.keras")):
        assert_close(trace_gates(path, tokens), expected)


# --- inputs ------------------------------------------------------------------


def test_tensors_and_nested_lists(tokens):
    model = sequential(LAYERS["LSTM"]())
    expected = numpy_trace(model.layers[1], embed(tokens, model))
    for inputs in (tokens, ops.convert_to_tensor(tokens), tokens.tolist()):
        assert_close(trace_gates(model, inputs), expected)
    assert_close(trace_gates(model, [list(map(float, t)) for t in tokens]), expected)


def test_nested_lists_among_several_inputs(x, states):
    inputs = [keras.Input((TIME, FEATURES)), keras.Input((FEATURES,))]
    layer = keras.layers.LSTM(UNITS)
    model = keras.Model(inputs, layer(inputs[0] + inputs[1][:, None]))
    shift = states[0][:, :FEATURES]
    expected = numpy_trace(layer, x + shift[:, None])
    assert_close(trace_gates(model, [x, shift.tolist()]), expected)
    assert_close(trace_gates(model, (x.tolist(), shift)), expected)


def batches_of(tokens, kind):
    """Batches of two samples, as a dataset."""
    y = np.zeros(len(tokens))
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
        return tf.data.Dataset.from_tensor_slices((tokens, y)).batch(2)
    if kind == "without targets":
        return (tokens[start : start + 2] for start in range(0, len(tokens), 2))
    if kind == "DataLoader":
        data = pytest.importorskip("torch", reason="torch is not installed").utils.data
        return data.DataLoader(list(zip(tokens, y, strict=True)), batch_size=2)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return -(-len(tokens) // 2)

        def __getitem__(self, index):
            steps = slice(2 * index, 2 * index + 2)
            return tokens[steps], y[steps], y[steps]

    return Batches()


@pytest.mark.parametrize("batches", [1, 2, None])
@pytest.mark.parametrize(
    "kind", ["tf.data", "PyDataset", "without targets", "DataLoader"]
)
def test_batches_of_a_dataset(kind, batches, tokens):
    model = sequential(LAYERS["LSTM"]())
    trace = trace_gates(model, batches_of(tokens, kind), batches=batches)
    traced = tokens[: {1: 2, 2: 4, None: BATCH}[batches]]
    assert_close(trace, numpy_trace(model.layers[1], embed(traced, model)))
    assert trace.mask is None


@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_batches_of_different_lengths_are_padded(mask_zero, bidirectional, tokens):
    layer = LAYERS["LSTM"]()
    layer = keras.layers.Bidirectional(layer) if bidirectional else layer
    model = sequential(layer, mask_zero=mask_zero)
    trace = trace_gates(model, iter([tokens[:3], tokens[3:, :4]]), batches=None)
    mask = np.ones((BATCH, TIME), bool)
    mask[3:, 4:] = False
    layers = [layer.forward_layer, layer.backward_layer] if bidirectional else [layer]
    traces = [trace, trace.backward] if bidirectional else [trace]
    for one, direction in zip(traces, layers, strict=True):
        np.testing.assert_array_equal(one.mask, mask)
        x = embed(tokens, model)
        assert_close(one, numpy_trace(direction, x, mask=mask))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has RaggedTensor")
@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("form", ["alone", "in a dict", "in a dataset"])
def test_ragged_tensor_matches_each_sample_alone(mask_zero, form, tokens):
    import tensorflow as tf

    lengths = [3, TIME, 1, 3, 5]
    samples = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    model = sequential(LAYERS["LSTM"](), mask_zero=mask_zero)
    ragged = tf.ragged.constant([sample.tolist() for sample in samples])
    functional = keras.Model({"tokens": model.inputs[0]}, model.outputs[0])
    inputs = {
        "alone": ragged,
        "in a dict": {"tokens": ragged},
        "in a dataset": [(ragged, np.zeros(BATCH))].__iter__(),
    }[form]
    trace = trace_gates(functional if form == "in a dict" else model, inputs)
    for k, sample in enumerate(samples):
        alone = numpy_trace(model.layers[1], embed(sample[None], model))
        for name, values in alone.items():
            found = getattr(trace, name)[k, : len(sample)]
            np.testing.assert_allclose(found, values[0], rtol=1e-4, atol=1e-5)
            assert np.isnan(getattr(trace, name)[k, len(sample) :]).all()
    np.testing.assert_array_equal(trace.mask.sum(1), lengths)


# --- states and fixed shapes -------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "ScratchLSTM", "RNN(ScratchLSTMCell)"])
@pytest.mark.parametrize("samples", [BATCH, 2, 1])
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

    def states():
        return [ops.convert_to_numpy(s) for s in [*lower.states, *traced.states]]

    before = [np.copy(state) for state in states()]
    trace = trace_gates(model, x[:samples], "traced", batch_size=2)
    np.testing.assert_equal(states(), before)
    x_traced = ops.convert_to_numpy(lower(x))[:samples]
    h, c = (state[:samples] for state in before[2:])
    assert_close(trace, numpy_trace(traced, x_traced, h=h, c=c))
    with pytest.raises(
        ValueError, match=r"`inputs` must have at most 5 .* Received: 10"
    ):
        trace_gates(model, np.concatenate([x, x]), "traced")


@BOTH
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("time", [None, 4, 4 * TIME])
def test_fixed_batch_shape(kind, stateful, mask_zero, time, tokens):
    layer = LAYERS[kind](stateful=stateful, return_sequences=True)
    model = sequential(layer, mask_zero=mask_zero, batch_size=BATCH + 3, time=time)
    tokens[:, 2:4] = 0
    trace = trace_gates(model, tokens)
    mask = tokens != 0 if mask_zero else None
    assert_close(trace, numpy_trace(layer, embed(tokens, model), mask=mask))
    if not stateful:  # more samples than the batch size
        many = np.concatenate([tokens] * 3)
        trace = trace_gates(model, many)
        mask = many != 0 if mask_zero else None
        assert_close(trace, numpy_trace(layer, embed(many, model), mask=mask))


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
        trace_gates(model, x, "traced")
    assert all(np.all(ops.convert_to_numpy(state) == 0) for state in lower.states)
    assert "call" not in vars(traced)
    fails.fails = False
    assert_close(
        trace_gates(model, x, 1), numpy_trace(traced, ops.convert_to_numpy(lower(x)))
    )


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

    def next_name():
        name = ScratchLSTM(1).name.removeprefix("scratch_lstm").strip("_")
        return int(name or 0)

    number, before = next_name(), observe()
    trace_gates(model, x)
    assert observe() == before
    assert next_name() == number + 1


# --- errors ------------------------------------------------------------------


@pytest.fixture
def stack():
    lower = keras.layers.LSTM(2, return_sequences=True, name="lower")
    upper = keras.layers.Bidirectional(ScratchLSTM(2, name="lstm"), name="upper")
    return sequential(lower, upper)


def check_error(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        trace_gates(*args, **kwargs)
    assert len(str(error.value)) <= 300
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layer", "received"),
    [
        (None, "None"),
        ("middle", "'middle'"),
        (2, "2"),
        (-3, "-3"),
        (keras.layers.Dense(1, name="other"), "other"),
        (["lower"], r"\['lower'\]"),
        (0.0, r"0\.0"),
    ],
)
def test_invalid_layer(layer, received, stack, tokens):
    match = rf"Pass `layer=` to choose one of: 'lower', 'upper'\. .*layer={received}$"
    check_error(match, stack, tokens, layer)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (None, "`model_or_layer` must be a Keras model or layer, or the path of a"),
        (keras.layers.LSTM, "`model_or_layer` must be a Keras model or layer"),
        (keras.Sequential(name="a"), "must be or contain a `ScratchLSTM`, .*: 'a'"),
        (keras.layers.GRU(2, name="a"), "must be or contain a `ScratchLSTM`"),
        (keras.layers.LSTM(2), r"must be built\. .* on data, or add `keras.Input`"),
        (keras.Sequential([keras.layers.LSTM(2)]), "must be built"),
        ("missing.keras", "File not found"),
    ],
    ids=str,
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
    assert_close(trace_gates(model, x, 1), numpy_trace(find_all(model)[1], x))


def test_subclass_of_built_in_cell(x):
    class CustomCell(keras.layers.LSTMCell):
        pass

    layer = keras.layers.RNN(CustomCell(2))
    layer(x)
    check_error("Received: 'rnn.*' with a 'CustomCell'", layer, x)


def test_layer_that_is_not_called(x):
    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.lstm = make("LSTM", name="unused")
            self.head = keras.layers.Dense(1)

        def call(self, inputs):
            return self.head(inputs)

    model = Unused()
    model(x)
    check_error("must be called in the model's forward pass.*'unused'", model, x)


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


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (np.zeros((0, TIME)), r"at least one sample.*array of shape \(0, 7\)"),
        (np.zeros((2, 0)), r"at least one time step.*array of shape \(2, 0, 3\)"),
        (3.0, "Received: inputs=3.0"),
        (None, "Received: inputs=None"),
        ("tokens", "Received: inputs='tokens'"),
        ({}, "Received: inputs={}"),
        (np.array([[1, None]]), r"array of shape \(1, 2\) and dtype object"),
        (object(), "Received: inputs=<object"),
        (iter([]), "or a dataset of batches. Received"),
        ([[1, 2, 3], [1]], "rows of different lengths. Pad it with `keras.utils.pad_s"),
        ([[1] * 50000, [1]], "Pad it with `keras.utils.pad_sequences`"),
        ([np.ones((2, 3)), np.ones((3, 3))], r"same number .* \(2, 3\), \(3, 3\)"),
        ([np.ones((k, 3)) for k in range(2, 999)], r"\(2, 3\), \(3, 3\)"),
    ],
)
def test_invalid_inputs(inputs, match):
    check_error(match, sequential(LAYERS["LSTM"]()), inputs)


def test_complex_inputs(x):
    check_error("must be real numbers.*complex64", make("LSTM"), x.astype("complex64"))


@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True])
@pytest.mark.parametrize("name", ["batch_size", "batches"])
def test_invalid_batch_size(name, value, x):
    check_error(
        f"`{name}` must be a positive integer", make("LSTM"), x, **{name: value}
    )
