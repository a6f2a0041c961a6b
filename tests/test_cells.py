"""The variants of the cell, against their equations in NumPy, float64."""

import keras
import numpy as np
import pytest
from gradients import BACKEND, compiled_variants, double_precision, with_gradients
from keras import layers, ops
from reference import assert_close, flat, lstm, weights_of

from keras_scratch_lstm import (
    CoupledLSTMCell,
    DropConnectLSTMCell,
    LayerNormLSTMCell,
    PeepholeLSTMCell,
    ScratchLSTM,
    ScratchLSTMCell,
    ZoneoutLSTMCell,
    recurrence,
    trace_gates,
)

CELLS = [
    PeepholeLSTMCell,
    CoupledLSTMCell,
    LayerNormLSTMCell,
    ZoneoutLSTMCell,
    DropConnectLSTMCell,
]
numpy = ops.convert_to_numpy


@pytest.fixture(params=CELLS, ids=lambda cell: cell.__name__)
def cell_class(request):
    return request.param


def random_cell(cell, rng, features=3):
    if not cell.built:
        cell.build((None, features))
    for weight in cell.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return cell


def test_cell_matches_numpy_in_every_wrapper(cell_class, rng, draw, tmp_path):
    cell, x = random_cell(cell_class(4), rng), draw(2, 5, 3)
    expected = lstm(x, weights_of(cell))[0]
    for wrap in (layers.RNN, lambda cell, **kwargs: ScratchLSTM(cell=cell, **kwargs)):
        assert_close(wrap(cell, return_sequences=True)(x), expected)

    layer = layers.Bidirectional(ScratchLSTM(cell=cell_class(4), return_sequences=True))
    model = keras.Sequential([keras.Input((5, 3)), layer])
    for direction in (layer.forward_layer, layer.backward_layer):
        direction.cell.set_weights(cell.get_weights())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    backward = lstm(x[:, ::-1], weights_of(cell))[0][:, ::-1]
    both = np.concatenate([expected, backward], -1)
    assert_close(loaded(x), both)
    trace = trace_gates(loaded, x)
    assert_close(trace.h, expected)
    assert_close(trace.backward.h, backward)
    if cell_class is CoupledLSTMCell:
        assert_close(trace.f, 1 - trace.i)


@pytest.mark.parametrize(
    ("cell_class", "rate"),
    [
        *((cell, 0.3) for cell in CELLS),
        *((cell, 0) for cell in (ScratchLSTMCell, DropConnectLSTMCell)),
    ],
    ids=str,
)
def test_gradients_match_finite_differences(cell_class, rate, rng):
    # Keras's layer normalization, and its loop on JAX, compute in float32.
    is_exact = cell_class is not LayerNormLSTMCell and BACKEND != "jax"
    size, tolerance = (1e-5, 1e-5) if is_exact else (3e-3, 1e-2)
    with double_precision():
        cell = cell_class(3, seed=2, recurrent_dropout=rate, dtype="float64")
        layer = ScratchLSTM(cell=cell, return_sequences=True, dtype="float64")
        layer.build((2, 4, 2))
        random_cell(cell, rng)
        x, weights = rng.normal(size=(2, 4, 2)), cell.trainable_weights

        def loss(x):
            cell.seed_generator.state.assign([2, 0])
            outputs = layer(x, training=True)
            return ops.sum(outputs * ops.cos(outputs)), outputs

        evaluate = with_gradients(loss, weights)
        _, (*by_weights, by_x) = evaluate(x)
        directions = [rng.normal(size=weight.shape) for weight in weights]
        direction_x = rng.normal(size=x.shape)
        values = [numpy(weight).copy() for weight in weights]

        def loss_at(distance):
            for weight, value, direction in zip(
                weights, values, directions, strict=True
            ):
                weight.assign(value + distance * direction)
            outputs, _ = evaluate(x + distance * direction_x)
            return np.sum(outputs * np.cos(outputs))

        # Of fourth order, as the norm of three units bends within a large step.
        near, far = (loss_at(h) - loss_at(-h) for h in (size, 2 * size))
        numeric = (8 * near - far) / (12 * size)
    gradients = zip([*by_weights, by_x], [*directions, direction_x], strict=True)
    slope = sum(np.sum(gradient * direction) for gradient, direction in gradients)
    np.testing.assert_allclose(slope, numeric, tolerance, tolerance)


@pytest.mark.parametrize(
    "cell_class", [LayerNormLSTMCell, ZoneoutLSTMCell, DropConnectLSTMCell]
)
def test_training_in_mixed_precision(cell_class, draw):
    cell = cell_class(4, dtype="mixed_bfloat16", dropout=0.2, recurrent_dropout=0.2)
    layer = ScratchLSTM(cell=cell, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((5, 3)), layer, layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=BACKEND == "tensorflow")
    before = [numpy(weight).copy() for weight in cell.trainable_weights]
    model.fit(draw(8, 5, 3), draw(8, 1), batch_size=4, verbose=0)
    assert {weight.dtype for weight in cell.trainable_weights} == {"float32"}
    for weight, old in zip(cell.trainable_weights, before, strict=True):
        assert not np.array_equal(numpy(weight), old), weight.path


def test_peephole_cell_starts_as_the_standard_cell(draw):
    x, outputs = draw(2, 5, 3), []
    for cell_class in (PeepholeLSTMCell, ScratchLSTMCell):
        keras.utils.set_random_seed(3)
        outputs.append(layers.RNN(cell_class(4))(x))
    assert_close(*outputs)


@pytest.mark.parametrize("unroll", [False, True])
def test_zoneout_draws_masks_at_every_time_step(unroll, draw):
    cell = ZoneoutLSTMCell(64, zoneout_c=0.7, zoneout_h=0.2, seed=1)
    layer = ScratchLSTM(cell=cell, unroll=unroll, return_sequences=True)
    x = draw(16, 10, 3)
    first, second = (numpy(layer(x, training=True)) for _ in range(2))
    assert not np.array_equal(first, second)
    kept = first[:, 1:] == first[:, :-1]
    # 0.2 of 9,216 values with a standard deviation of 0.004.
    assert abs(kept.mean() - 0.2) < 0.025
    # Independent of the previous time step, of the unit and of the sample.
    for axis in (0, 1, 2):
        a, b = np.swapaxes(kept, 0, axis)[1:], np.swapaxes(kept, 0, axis)[:-1]
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.06


def test_zoneout_keeps_or_replaces_states(draw):
    cell = ZoneoutLSTMCell(50, zoneout_c=0.7, zoneout_h=0.2, seed=1)
    x, h, c = draw(40, 3), draw(40, 50), draw(40, 50)
    states = [ops.convert_to_tensor(state) for state in (h, c)]
    layer = ScratchLSTM(cell=cell, return_state=True)
    _, new_h, new_c = layer(x[:, None], initial_state=states, training=True)
    standard = ScratchLSTMCell(50)
    standard.build((None, 3))
    standard.set_weights(cell.get_weights())
    _, replaced = standard(x, states)
    for new, new_value, old, rate in (
        (new_h, replaced[0], h, 0.2),
        (new_c, replaced[1], c, 0.7),
    ):
        new = numpy(new)
        kept = new == old
        assert abs(kept.mean() - rate) < 0.05  # a standard deviation below 0.011
        assert_close(new, np.where(kept, old, numpy(new_value)), 1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_zoneout_in_training_needs_a_scratch_lstm(draw, stacked):
    x, cell = draw(2, 5, 3), ZoneoutLSTMCell(4)
    rnn = layers.RNN([cell, ZoneoutLSTMCell(4)] if stacked else cell)
    assert rnn(x).shape == (2, 4)
    with pytest.raises(ValueError, match=r"Use `ScratchLSTM\(cell=...\)` in place"):
        rnn(x, training=True)


@pytest.mark.parametrize(
    ("cell_class", "rates"),
    [
        (ScratchLSTMCell, {"dropout": 0.3, "recurrent_dropout": 0.3}),
        (ZoneoutLSTMCell, {}),
        (DropConnectLSTMCell, {}),
    ],
    ids=str,
)
@pytest.mark.ci
def test_masks_depend_on_the_seed_alone(draw, cell_class, rates):
    """However a call is executed, and however its inputs are rounded."""
    cell, x = cell_class(8, seed=3, **rates), draw(4, 6, 5)
    layer = ScratchLSTM(cell=cell, return_sequences=True)
    layer.build(x.shape)
    state = numpy(cell.seed_generator.state).copy()

    def run(call, x):
        cell.seed_generator.state.assign(state)
        return numpy(call(ops.convert_to_tensor(x)))

    expected = run(lambda x: layer(x, training=True), x)
    assert not np.allclose(numpy(layer(x, training=True)), expected)
    # Under XLA, TensorFlow draws other masks for Keras's dropout, as in its own LSTM.
    for call in compiled_variants(layer, xla=not rates):
        assert_close(run(call, x), expected)
    rounded = np.nextafter(x, np.float32(np.inf))
    assert_close(run(lambda x: layer(x, training=True), rounded), expected)


def test_drop_connect_has_one_mask_per_sequence(rng, draw):
    cell = random_cell(DropConnectLSTMCell(4, drop_connect=0.5, seed=3), rng)
    x, outputs = draw(2, 5, 3), []
    fast = ScratchLSTM(cell=cell, return_sequences=True)
    for layer in (layers.RNN(cell, return_sequences=True), fast, fast):
        seed = numpy(cell.seed_generator.state)
        masks = [
            2 * (numpy(recurrence.random_uniform((4, 4), cell.seed_generator)) < 0.5)
            for _ in "ifoc"
        ]
        cell.seed_generator.state.assign(seed)
        w = weights_of(cell)
        for gate, mask in zip("ifoc", masks, strict=True):
            w[f"W_h{gate}"] = w[f"W_h{gate}"] * mask
        outputs.append(layer(x, training=True))
        assert_close(outputs[-1], lstm(x, w)[0])
    assert not np.allclose(*flat(outputs[1:]))
    assert fast.recurrence != "loop"


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("make", "name"),
    [(ZoneoutLSTMCell, "zoneout_h"), (DropConnectLSTMCell, "drop_connect")],
)
def test_rates_are_checked_and_saved(make, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a number from 0 to 1"):
        make(4, **{name: 1.5})
    config = make(4, **{name: 0.25}).get_config()
    assert config[name] == make.from_config(config).get_config()[name] == 0.25


@pytest.mark.parametrize(
    "cell_class", [ScratchLSTMCell, CoupledLSTMCell, DropConnectLSTMCell]
)
def test_calls_of_the_cell_alone_advance_the_seed_like_those_of_a_layer(
    draw, cell_class
):
    x, rates = draw(3, 1, 5), {"dropout": 0.5, "recurrent_dropout": 0.5}
    cell, in_layer = (cell_class(6, seed=1, **rates) for _ in range(2))
    cell(x[:, 0], cell.get_initial_state(3), training=True)
    layers.RNN(in_layer)(x, training=True)
    one, other = (numpy(each.seed_generator.state) for each in (cell, in_layer))
    np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(BACKEND != "torch", reason="other backends move tensors")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cell_class", [ScratchLSTMCell, *CELLS])
def test_inputs_are_moved_to_the_device_of_the_weights(draw, cell_class, masked):
    """The device `meta` stands in for a GPU."""
    x, h, c = (ops.convert_to_tensor(draw(3, *shape)) for shape in ((7, 5), (6,), (6,)))
    mask = np.arange(7) < np.array([[7], [4], [1]])
    mask = ops.convert_to_tensor(mask) if masked else None
    with keras.device("meta"):
        cell = cell_class(6, dropout=0.5, recurrent_dropout=0.5 * masked)
        layer = ScratchLSTM(cell=cell, return_state=True)
        layer.build(x.shape)
        outputs = layer(x, initial_state=[h, c], mask=mask, training=True)
    assert {tensor.device.type for tensor in outputs} == {"meta"}
