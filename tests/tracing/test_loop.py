import gc
import weakref

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
    embed,
    make,
    numpy_trace,
    sequential,
)
from reference import weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, trace_gates
from keras_scratch_lstm.observing import loop, standard
from keras_scratch_lstm.tracing.trace import ARRAYS

BACKEND = keras.backend.backend()
BOTH = pytest.mark.parametrize("kind", ["LSTM", "ScratchLSTM"])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["default", "without what is for torch"])
def method(request, monkeypatch):
    """A standard cell has its own loop on torch."""
    if request.param != "default":
        if BACKEND != "torch":
            pytest.skip("the only method of this backend")
        monkeypatch.setattr(standard, "applies", lambda cell: False)


@pytest.mark.parametrize("kind", LAYERS)
def test_trace_matches_numpy_reference(kind, x):
    layer = make(kind, go_backwards=kind != "LSTM", return_sequences=True)
    trace = trace_gates(layer, x)
    assert_close(trace, numpy_trace(layer, x))
    assert trace.mask is None
    assert trace.backward is None
    assert trace.layer == layer.name


@BOTH
def test_both_methods_match_numpy_reference(kind, method, x, states, rng):
    layer = make(kind)
    assert_close(trace_gates(layer, x), numpy_trace(layer, x))
    mask = rng.random((BATCH, TIME)) < 0.6
    inputs = keras.Input((TIME, FEATURES)), keras.Input((TIME,), dtype="bool")
    h, c = states[:2]
    initial = list(map(ops.convert_to_tensor, (h, c)))
    outputs = layer(inputs[0], mask=inputs[1], initial_state=initial)
    trace = trace_gates(keras.Model(inputs, outputs), [x, mask])
    assert_close(trace, numpy_trace(layer, x, h=h, c=c, mask=mask))


@BOTH
def test_other_activations_without_bias(kind, x):
    layer = LAYERS[kind](
        use_bias=False, activation="softsign", recurrent_activation="hard_sigmoid"
    )
    layer(x)
    trace = trace_gates(layer, x)
    z = x[:, 0] @ weights_of(layer.cell)["W_xf"]
    np.testing.assert_allclose(trace.f[:, 0], np.clip(z / 6 + 0.5, 0, 1), **CLOSE)
    h = trace.o * trace.c / (1 + abs(trace.c))
    np.testing.assert_allclose(trace.h, h, **CLOSE)
    c = trace.f[:, 1:] * trace.c[:, :-1] + (trace.i * trace.c_tilde)[:, 1:]
    np.testing.assert_allclose(trace.c[:, 1:], c, **CLOSE)


def test_overridden_call_of_a_custom_cell(x):
    class LeakyCell(ScratchLSTMCell):
        def call(self, inputs, states, training=False):
            h, (_, c) = super().call(inputs, states, training)
            return h, [h, 0.5 * c]

    layer = keras.layers.RNN(LeakyCell(UNITS), return_sequences=True)
    h = ops.convert_to_numpy(layer(x))
    trace = trace_gates(layer, x)
    np.testing.assert_allclose(trace.h, h, rtol=1e-5, atol=1e-6)
    first = 0.5 * trace.i[:, 0] * trace.c_tilde[:, 0]
    np.testing.assert_allclose(trace.c[:, 0], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "policy", "dtype", "rtol", "atol"),
    [
        ("LSTM", "mixed_bfloat16", "float32", 0.05, 0.02),
        ("ScratchLSTM", "mixed_float16", "float32", 0.05, 0.02),
        ("ScratchLSTM", "bfloat16", "float32", 0.05, 0.02),
        ("LSTM", "float64", "float64", 1e-12, 1e-14),
    ],
)
def test_precision_of_the_trace(kind, policy, dtype, rtol, atol, x, dtype_policy):
    if policy == "float64" and BACKEND not in ("tensorflow", "torch"):
        pytest.skip("Keras computes float32 here")
    dtype_policy(policy)
    layer = make(kind, recurrent_initializer="glorot_uniform")
    trace = trace_gates(layer, x)
    assert {getattr(trace, name).dtype.name for name in ARRAYS} == {dtype}
    assert_close(trace, numpy_trace(layer, x), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("kind", "given"),
    [("LSTM", True), ("RNN(ScratchLSTMCell)", False)],
)
def test_both_directions_are_in_input_order(kind, given, x, states, rng):
    layer = keras.layers.Bidirectional(LAYERS[kind](name="lstm"))
    inputs = keras.Input((TIME, FEATURES)), keras.Input((TIME,), dtype="bool")
    mask, kwargs = rng.random((BATCH, TIME)) < 0.7, {}
    if given:
        kwargs["initial_state"] = [ops.convert_to_tensor(state) for state in states]
    else:
        states = [None] * 4
    model = keras.Model(inputs, layer(inputs[0], mask=inputs[1], **kwargs))
    inputs = [x, mask]
    trace = trace_gates(model, inputs)
    forward = numpy_trace(layer.forward_layer, x, *states[:2], mask=mask)
    backward = numpy_trace(layer.backward_layer, x, *states[2:], mask=mask)
    assert_close(trace, forward)
    assert_close(trace.backward, backward)
    assert (trace.layer, trace.backward.layer) == ("forward_lstm", "backward_lstm")
    assert_close(trace_gates(model, inputs, layer="backward_lstm"), backward)
    assert_close(trace_gates(model, inputs, layer=layer), forward)


def test_time_major(x):
    layer = ScratchLSTM(UNITS, time_major=True, return_sequences=True)
    inputs = keras.Input(batch_shape=(None, None, FEATURES))
    model = keras.Model(inputs, layer(inputs))
    for each in (layer, model):
        trace = trace_gates(each, np.swapaxes(x, 0, 1), batch_size=2)
        assert_close(trace, numpy_trace(layer, x))


@pytest.mark.parametrize("kind", ["LSTM", "custom cell"])
def test_masked_time_steps_are_nan(kind, tokens, rng):
    mask = rng.random((BATCH, TIME)) < 0.5
    tokens = np.where(mask, tokens, 0)
    model = sequential(LAYERS[kind](), mask_zero=True)
    trace = trace_gates(model, tokens)
    assert_close(trace, numpy_trace(model.layers[1], embed(tokens, model), mask=mask))
    np.testing.assert_array_equal(trace.mask, mask)


def test_batches_and_chunks_of_time_do_not_change_the_trace(
    method, tokens, monkeypatch
):
    tokens[0, :3] = 0  # masked
    model = sequential(ScratchLSTM(UNITS, go_backwards=True), mask_zero=True)
    at_once = trace_gates(model, tokens)
    monkeypatch.setattr(loop, "CHUNK_SIZE", 2 * UNITS * 2)  # two steps of two
    chunked = trace_gates(model, tokens, batch_size=2)
    np.testing.assert_array_equal(chunked.mask, at_once.mask)
    assert_close(chunked, at_once, rtol=1e-6, atol=1e-7)


@BOTH
def test_weight_updates_are_traced_without_dropout(kind, x):
    layer = make(kind, dropout=0.5, recurrent_dropout=0.5)
    assert_close(trace_gates(layer, x), numpy_trace(layer, x))
    layer.set_weights([2 * weight for weight in layer.get_weights()])
    assert_close(trace_gates(layer, x), numpy_trace(layer, x))
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None  # no function keeps a traced layer


@BOTH
def test_traces_on_a_gpu_are_without_cudnn(kind, x, mocked_gpu):
    layer = make(kind)
    assert_close(trace_gates(layer, x), numpy_trace(layer, x))
    assert not mocked_gpu
