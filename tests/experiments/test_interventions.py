from fractions import Fraction

import keras
import models
import numpy as np
import pytest
from keras import ops
from models import (
    BATCH,
    FEATURES,
    LAYERS,
    TIME,
    UNITS,
    VARIANTS,
    classifier,
    make,
    numpy_lstm,
    with_mask,
)
from reference import ARRAYS, label, tensor

from keras_scratch_lstm import (
    Edit,
    GateTrace,
    ScratchLSTM,
    ScratchLSTMCell,
    run_with_edits,
    trace_gates,
)

BACKEND = keras.backend.backend()
BOTH = pytest.mark.parametrize("kind", ["LSTM", "ScratchLSTM"])


def to_numpy(x):
    return ops.convert_to_numpy(x)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def assert_equal_traces(trace, expected):
    for name in ARRAYS:
        assert_close(getattr(trace, name), expected[name])


@pytest.mark.parametrize("kind", [*LAYERS, *VARIANTS])
def test_edits_of_all_arrays_of_every_cell(kind, x, rng):
    """What depends on an edited array follows, in the same time step too."""
    mask = rng.random((BATCH, TIME)) < 0.8
    layer = make(kind, return_sequences=True, go_backwards=bool(rng.integers(2)))
    edits, places = [], []
    for name in ARRAYS:
        steps, value = rng.permutation(TIME)[:3], rng.normal(size=(2, 3, 2))
        where = {"steps": list(steps), "units": slice(1, 3), "samples": [2, 0]}
        edits.append(Edit(name, value, **where))
        edits.append(Edit(name, scale=Fraction(1, 2), steps=-1))
        places.append((steps, value))

    def edit(name, values, t):
        steps, value = places[ARRAYS.index(name)]
        values = values.copy()
        for k in np.flatnonzero(steps == t):
            values[[2, 0], 1:3] = value[:, k]
        return values * (0.5 if t == TIME - 1 else 1)

    outputs, trace = run_with_edits(with_mask(layer), [x, mask], edits=edits)
    expected, h = numpy_lstm(layer, x, edit, mask=mask)
    # A layer normalization may amplify rounding.
    models.assert_close(trace, expected)
    np.testing.assert_allclose(outputs, h, rtol=1e-4, atol=1e-5)


def test_inputs_can_be_edited(x):
    layer = make("ScratchLSTM", return_sequences=True)
    silent = x.copy()
    silent[:, 2:5, 1] = 0
    outputs, _ = run_with_edits(layer, x, edits=Edit("x", 0, steps=[2, 3, 4], units=1))
    assert_close(outputs, numpy_lstm(layer, silent)[1])


def test_missing_axes_of_a_value(x, rng):
    """A tensor without an axis of the one time step."""
    layer, others = make("LSTM"), rng.normal(size=(BATCH, TIME, UNITS))
    expected, _ = run_with_edits(layer, x, edits=Edit("c", others[:, 4:5], steps=[4]))
    found, _ = run_with_edits(layer, x, edits=Edit("c", tensor(others[:, 4]), steps=4))
    assert_close(found, expected)
    with pytest.raises(ValueError, match="broadcasts in one way only"):
        run_with_edits(layer, x, edits=Edit("c", others[:, 4, :, None], steps=4))


@pytest.mark.one_backend
def test_ambiguous_values_are_rejected(rng):
    layer = make("LSTM")
    x = rng.normal(size=(UNITS, TIME, FEATURES))  # as many samples as units
    for value in (np.ones(UNITS), "0.5", np.array(["0.5"])):
        with pytest.raises(ValueError, match="broadcasts in one way only"):
            run_with_edits(layer, x, edits=Edit("f", value))
    run_with_edits(layer, x, edits=Edit("f", np.ones((1, 1, UNITS))))
    trace = trace_gates(layer, x[:2])
    with pytest.raises(ValueError, match=r"Received: a `GateTrace` with shape \(2, 7"):
        run_with_edits(layer, x, edits=Edit("f", trace))
    both = keras.layers.Bidirectional(make("LSTM"))
    both.build(x.shape)
    with pytest.raises(ValueError, match="a `GateTrace` with no `backward`"):
        run_with_edits(both, x, edits=Edit("f", trace_gates(layer, x)))


# --- models ------------------------------------------------------------------


@BOTH
def test_stateful_model_keeps_its_states(kind, x):
    layer = make(kind, stateful=True, return_state=True)
    layer(x)  # states other than zero
    before = [to_numpy(state).copy() for state in layer.states]
    (last, h, c), trace = run_with_edits(layer, x, edits=Edit("i", 0.0))
    expected, outputs = numpy_lstm(
        layer, x, lambda name, values, t: values * (name != "i"), *before
    )
    assert_equal_traces(trace, expected)
    assert_close(last, outputs[:, -1])
    assert_close(h, outputs[:, -1])
    assert_close(c, expected["c"][:, -1])
    np.testing.assert_equal([to_numpy(state) for state in layer.states], before)


def test_options_of_the_layer(x):
    """Time-major, without bias, with other activations, in half precision."""
    layer = make("ScratchLSTM", time_major=True, return_sequences=True)
    outputs, trace = run_with_edits(
        layer, x.swapaxes(0, 1), edits=Edit("o", 1.0, samples=1)
    )

    def edit(name, values, t):
        if name == "o":
            values[1] = 1
        return values

    expected, h = numpy_lstm(layer, x, edit)
    assert_equal_traces(trace, expected)
    assert_close(outputs, h.swapaxes(0, 1))
    for options in (
        {"use_bias": False, "unroll": True},
        {"activation": "relu", "recurrent_activation": "hard_sigmoid"},
    ):
        for kind in (keras.layers.LSTM, ScratchLSTM):
            layer = kind(UNITS, **options)
            expected = to_numpy(layer(x))
            assert_close(run_with_edits(layer, x, edits=[])[0], expected)
    layer = keras.layers.LSTM(UNITS, dtype="mixed_bfloat16")
    expected = to_numpy(ops.cast(layer(x), "float32"))
    outputs, trace = run_with_edits(layer, x, edits=[])
    np.testing.assert_allclose(np.float32(outputs), expected, atol=0.02)
    assert trace.c.dtype == "float32"


def test_calls_of_a_shared_layer(x):
    layer = keras.layers.LSTM(FEATURES, return_sequences=True)
    inputs = keras.Input((TIME, FEATURES))
    model = keras.Model(inputs, layer(layer(inputs)))
    outputs, _ = run_with_edits(model, x, edits=Edit("h", 0.5))
    assert_close(outputs, to_numpy(layer(np.full_like(x, 0.5))))
    once = to_numpy(layer(x))
    edit = Edit("h", 0.5, steps=2)
    expected, trace = run_with_edits(layer, once, edits=edit)
    outputs, second = run_with_edits(model, x, edits=edit, call_index=1)
    assert_close(outputs, expected)
    assert_equal_traces(second, vars(trace))
    with pytest.raises(ValueError, match="`call_index` must be less than 2, how often"):
        run_with_edits(model, x, edits=[], call_index=2)


def test_both_directions_in_one_run(x, rng):
    mask = rng.random((BATCH, TIME)) < 0.7
    mask[0, :2], mask[:, 3] = False, True
    both = keras.layers.Bidirectional(make("LSTM", return_sequences=True))
    model = with_mask(both)
    unedited, _ = run_with_edits(model, [x, mask], edits=[])
    assert_close(unedited, to_numpy(model([x, mask])))
    _, other = run_with_edits(model, [x[::-1].copy(), mask | True], edits=[])
    edits = [Edit("f", 0.5, units=1), Edit("c", other, steps=3)]
    outputs, trace = run_with_edits(model, [x, mask], edits=edits)
    hidden = []
    for layer, one, patch in zip(
        (both.forward_layer, both.backward_layer),
        (trace, trace.backward),
        (other.c, other.backward.c),
        strict=True,
    ):

        def edit(name, values, t, patch=patch):
            if name == "f":
                values[:, 1] = 0.5
            return patch[:, 3] if (name, t) == ("c", 3) else values

        expected, h = numpy_lstm(layer, x, edit, mask=mask)
        assert_equal_traces(one, expected)
        h = h[:, ::-1] if layer.go_backwards else h
        hidden.append(np.where(mask[..., None], h, 0))
        np.testing.assert_array_equal(one.mask, mask)
    assert_close(outputs, np.concatenate(hidden, -1))


@pytest.mark.parametrize("batch_size", [2, BATCH])
def test_batches_are_edited_as_one(batch_size, x, rng):
    model = classifier(make("LSTM", return_sequences=True))
    value = rng.normal(size=(3, TIME, UNITS))
    edits = [Edit("c", value, samples=[4, 0, 1]), Edit("f", scale=0.5, samples=-2)]
    expected, trace = run_with_edits(model, x, edits=edits)
    dataset = [(x[k : k + 2], np.zeros(2)) for k in range(0, BATCH, 2)]
    for inputs in (x, iter(dataset)):
        options = {"batch_size": batch_size, "batches": None}
        outputs, found = run_with_edits(model, inputs, edits=edits, **options)
        assert_close(outputs, expected)
        assert_equal_traces(found, vars(trace))


@pytest.mark.parametrize(
    ("zero", "unroll", "backwards"),
    [
        (False, False, True),
        (True, False, False),
        (False, True, False),
        (True, True, True),
    ],
)
def test_masked_outputs_are_those_of_keras(zero, unroll, backwards, x, rng):
    if BACKEND == "torch" and unroll and backwards:
        pytest.skip("Keras does not support masks here")
    mask = rng.random((BATCH, TIME)) < 0.6
    options = {"unroll": unroll, "go_backwards": backwards, "return_sequences": True}
    for kind in ("LSTM", "ScratchLSTM"):
        layer = make(kind, **options, zero_output_for_mask=zero)
        model = with_mask(layer)
        outputs, _ = run_with_edits(model, [x, mask], edits=[])
        assert_close(outputs, to_numpy(model([x, mask])))


def without_value(layer):
    return [name for name, value in vars(layer).items() if value is None]


@pytest.mark.parametrize(
    ("kind", "error"),
    [("LSTM", KeyboardInterrupt), ("custom cell", RuntimeError)],
)
@pytest.mark.ci
def test_model_is_unchanged_after_an_error(kind, error, x):
    class Fails(keras.layers.Layer):
        fails = False

        def call(self, inputs):
            if self.fails:
                raise error("after the LSTM")
            return inputs

    fails = Fails()
    model = keras.Sequential([classifier(make(kind)), fails])
    layer, before = model.layers[0].layers[0], to_numpy(model(x))
    weights = model.get_weights()
    layer.cell.dropout = layer.cell.recurrent_dropout = 0.5
    run_with_edits(model, x, edits=[])
    attributes, unset = sorted(vars(layer)), without_value(layer.cell)
    fails.fails = True
    with pytest.raises(error, match="after the LSTM"):
        run_with_edits(model, x, edits=Edit("f", 1.0))
    fails.fails = False
    assert without_value(layer.cell) == unset  # the dropout masks, too
    assert sorted(vars(layer)) == attributes
    np.testing.assert_equal(model.get_weights(), weights)
    assert_close(to_numpy(model(x)), before)


# --- errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"array": "g"}, r"`array` must be one of 'x', 'i', .* Received: array='g'"),
        ({}, "Exactly one of `value` and `scale` must be given"),
        ({"value": 1.0, "scale": 2.0}, "Exactly one of `value` and `scale` must be"),
        ({"scale": np.nan}, "`scale` must be a finite number. Received: scale=nan"),
    ],
)
@pytest.mark.one_backend
def test_invalid_edit(arguments, message):
    with pytest.raises(ValueError, match=message):
        Edit(**{"array": "f"} | arguments)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("f", 1.0, units=UNITS), "`units` must be an integer, a slice or a list"),
        (Edit("f", 1.0, steps=TIME), "`steps` .* selects some of 7. Received: steps=7"),
        (Edit("f", 1.0, samples=[]), "`samples` must be"),
        (Edit("f", np.ones(UNITS + 2)), r"broadcasts in one way only .* \(5, 7, 4\)"),
        (Edit("f", lambda gates, t: 1 - gates.i), "`value` must be a number"),
        (Edit("f", np.nan), "`value` must be finite"),
        (
            Edit("f", GateTrace(*[np.zeros((BATCH, TIME + 1, UNITS))] * 6)),
            r"`GateTrace` of shape \(5, 7, 4\), .* Received: .* \(5, 8, 4\)",
        ),
        (None, "`edits` must be an `Edit` or a list of these. Received: edits=None"),
    ],
    ids=label,
)
@pytest.mark.one_backend
def test_edit_that_does_not_fit_the_layer(edit, message, x):
    model = classifier(make("LSTM"))
    ran = []
    model.layers[1].call = lambda *args, **kwargs: ran.append(1)
    with pytest.raises(ValueError, match=message):
        run_with_edits(model, x, edits=edit)
    assert not ran


def test_layers_that_cannot_be_edited(x):
    class Halved(ScratchLSTMCell):
        def call(self, inputs, states, training=False):
            h, (_, c) = super().call(inputs, states, training)
            return h, [h, 0.5 * c]

    halved = ScratchLSTM(cell=Halved(UNITS))
    halved.build(x.shape)
    for model, message in (
        (halved, "'c' must pass through `observe` in the cell.*with a 'Halved'"),
        (keras.layers.LSTM(UNITS), "must be built"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            run_with_edits(model, x, edits=Edit("c", 0.0))
        assert "\n" not in str(raised.value)
