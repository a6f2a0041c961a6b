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
from reference import tensor

from keras_scratch_lstm import trace_gates
from keras_scratch_lstm.tracing.tokens import tokens_per_sample


def test_tensors_and_nested_lists(tokens, x, states):
    model = sequential(LAYERS["LSTM"]())
    expected = numpy_trace(model.layers[1], embed(tokens, model))
    for inputs in (ops.convert_to_tensor(tokens), tokens.tolist()):
        assert_close(trace_gates(model, inputs), expected)
    inputs = [keras.Input((TIME, FEATURES)), keras.Input((FEATURES,))]
    layer = keras.layers.LSTM(UNITS)
    model = keras.Model(inputs, layer(inputs[0] + inputs[1][:, None]))
    shift = states[0][:, :FEATURES]
    expected = numpy_trace(layer, x + shift[:, None])
    assert_close(trace_gates(model, (x.tolist(), shift)), expected)


def batches_of(tokens, kind):
    """Batches of two samples, as a dataset."""
    y = np.zeros(len(tokens))
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
        return tf.data.Dataset.from_tensor_slices((tokens, y)).batch(2)
    if kind == "DataLoader":
        data = pytest.importorskip("torch", reason="torch is not installed").utils.data
        return data.DataLoader(list(zip(tokens, y, strict=True)), batch_size=2)
    batches = [slice(start, start + 2) for start in range(0, len(tokens), 2)]
    if kind == "without targets":
        return (tokens[batch] for batch in batches)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, k):
            return tokens[batches[k]], y[batches[k]], y[batches[k]]

    return Batches()


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        ("tf.data", 1),
        ("PyDataset", None),
        ("without targets", 1),
        ("DataLoader", 2),
    ],
)
def test_batches_of_a_dataset(kind, batches, tokens):
    model = sequential(LAYERS["LSTM"]())
    trace = trace_gates(model, batches_of(tokens, kind), batches=batches)
    traced = tokens[: {1: 2, 2: 4, None: BATCH}[batches]]
    assert_close(trace, numpy_trace(model.layers[1], embed(traced, model)))
    assert trace.mask is None


def test_batches_of_different_lengths_are_padded(tokens):
    layer = keras.layers.Bidirectional(LAYERS["LSTM"]())
    model = sequential(layer)
    trace = trace_gates(model, iter([tokens[:3], tokens[3:, :4]]), batches=None)
    mask = np.ones((BATCH, TIME), bool)
    mask[3:, 4:] = False
    x = embed(tokens, model)
    for one, direction in zip(
        (trace, trace.backward),
        (layer.forward_layer, layer.backward_layer),
        strict=True,
    ):
        np.testing.assert_array_equal(one.mask, mask)
        assert_close(one, numpy_trace(direction, x, mask=mask))


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow has RaggedTensor"
)
@pytest.mark.parametrize(
    ("mask_zero", "form"),
    [(True, "alone"), (True, "in a dict"), (False, "in a dataset")],
)
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
        "in a dataset": iter([(ragged, np.zeros(BATCH))]),
    }[form]
    trace = trace_gates(functional if form == "in a dict" else model, inputs)
    for k, sample in enumerate(samples):
        alone = numpy_trace(model.layers[1], embed(sample[None], model))
        for name, values in alone.items():
            found = getattr(trace, name)[k, : len(sample)]
            np.testing.assert_allclose(found, values[0], rtol=1e-4, atol=1e-5)
            assert np.isnan(getattr(trace, name)[k, len(sample) :]).all()
    np.testing.assert_array_equal(trace.mask.sum(1), lengths)
    stateful = sequential(LAYERS["LSTM"](stateful=True), batch_size=BATCH)
    check_error(
        "must be padded, with a mask, for a model with stateful", stateful, ragged
    )


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (np.zeros((0, TIME)), r"at least one sample.*array of shape \(0, 7\)"),
        (np.zeros((2, 0)), r"at least one time step.*array of shape \(2, 0\)"),
        (None, "Received: inputs=None"),
        ("tokens", "Received: inputs='tokens'"),
        (np.array([[1, None]]), r"array of shape \(1, 2\) and dtype object"),
        (iter([]), "or a dataset of batches. Received"),
        (
            [[1] * 50000, [1]],
            "rows of different lengths. Pad it with `keras.utils.pad_s",
        ),
        (
            [np.ones((k, 3)) for k in range(2, 999)],
            r"same number .* \(2, 3\), \(3, 3\)",
        ),
    ],
)
@pytest.mark.one_backend
def test_invalid_inputs(inputs, match):
    check_error(match, sequential(LAYERS["LSTM"]()), inputs)


def test_complex_inputs(x):
    match = "`inputs` must be real numbers .*dtype complex64"
    check_error(match, make("LSTM"), x.astype("complex64"))


def test_features_and_tokens_may_be_tensors(trace, rng):
    values = rng.integers(1, 9, (2, 3)).astype("float32")
    expected = trace.correlate({"a": values})
    np.testing.assert_equal(trace.correlate({"a": tensor(values)}), expected)
    tokens = values.astype(str).tolist()
    assert tokens_per_sample(tensor(values), 2, 3) == tokens
    assert tokens_per_sample(list(tensor(values)), 2, 3) == tokens
    assert tokens_per_sample(list(tensor(values[0])), 2, 3) == tokens[:1]
