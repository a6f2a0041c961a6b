import inspect
import json

import keras
import numpy as np
import pytest
from gradients import with_gradients
from keras import layers, ops
from reference import NAMES, fuse, lstm_step, weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

numpy = ops.convert_to_numpy


def flat(outputs):
    return [numpy(output) for output in keras.tree.flatten(outputs)]


def assert_close(ours, theirs, atol=1e-5):
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert np.ptp(other) > 0  # not all masked or dropped away
        np.testing.assert_allclose(one, other, atol=atol)


def lstm(x, w, h=0, c=0, mask=None):
    """The whole sequence in NumPy; `mask` is not to begin with False."""
    h, c = (np.zeros((len(x), w["W_hi"].shape[0])) + state for state in (h, c))
    outputs = []
    for t in range(x.shape[1]):
        new_h, new_c = lstm_step(x[:, t].astype("float64"), h, c, w)
        kept = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(kept, new_h, h), np.where(kept, new_c, c)
        outputs.append(h)
    return np.stack(outputs, 1), h, c


@pytest.fixture
def draw(rng):
    return lambda *shape: rng.normal(size=shape).astype("float32")


MASK = np.arange(7) < np.array([[7], [4], [1]])  # right-padded
GAPS = np.array([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1], [1] * 7], bool)


# --- the equations -----------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK, GAPS], ids=["unmasked", "padded", "gaps"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
def test_a_sequence_follows_the_equations(draw, use_bias, unroll, mask):
    layer = ScratchLSTM(
        6,
        use_bias=use_bias,
        bias_initializer="random_normal",
        return_sequences=True,
        return_state=True,
        unroll=unroll,
    )
    x = draw(3, 7, 5)
    outputs = layer(x, mask=mask)
    expected = lstm(x, weights_of(layer.cell), mask=mask)
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(numpy(output), value, atol=1e-6)


def test_the_sequence_may_run_backwards(draw):
    layer = ScratchLSTM(6, go_backwards=True, return_sequences=True, return_state=True)
    x = draw(3, 7, 5)
    outputs = layer(x, mask=GAPS)
    expected = lstm(x[:, ::-1], weights_of(layer.cell), mask=GAPS[:, ::-1])
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(numpy(output), value, atol=1e-6)


def test_what_is_returned(draw):
    """`h` of the last step or of all, and the last states on demand."""
    x, results = draw(3, 7, 5), {}
    for sequences in (False, True):
        for state in (False, True):
            keras.utils.set_random_seed(3)
            layer = ScratchLSTM(6, return_sequences=sequences, return_state=state)
            results[sequences, state] = flat(layer(x))
    (all_h, h, c) = results[True, True]
    assert all_h.shape == (3, 7, 6)
    assert h.shape == c.shape == (3, 6)
    np.testing.assert_array_equal(all_h[:, -1], h)
    expected = {
        (False, False): [h],
        (True, False): [all_h],
        (False, True): [h, h, c],
    }
    for key, values in expected.items():
        for one, other in zip(results[key], values, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("sequences", [False, True], ids=["last", "sequences"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("time_major", [False, True], ids=["", "time_major"])
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_symbolic_shapes(sequences, state, time_major, known):
    batch, time = (3, 7) if known else (None, None)
    shape = (time, batch, 5) if time_major else (batch, time, 5)
    layer = ScratchLSTM(
        6, return_sequences=sequences, return_state=state, time_major=time_major
    )
    outputs = keras.tree.flatten(layer(keras.Input(batch_shape=shape)))
    first = (*shape[:2], 6) if sequences else (batch, 6)
    expected = [first, (batch, 6), (batch, 6)] if state else [first]
    assert [tuple(output.shape) for output in outputs] == expected
    computed = layer.compute_output_shape(shape)
    assert (list(computed) if state else [computed]) == expected


# --- the same as the built-in layer ------------------------------------------


def pair(wrap=lambda layer: layer, **arguments):
    """Our layer and the built-in one, from the same seed, in the same wrapper."""
    result = []
    for layer in (ScratchLSTM, layers.LSTM):
        keras.utils.set_random_seed(7)
        result.append(wrap(layer(6, **arguments)))
    return result


def test_the_arguments_come_in_the_order_of_the_built_in_layer():
    def positional(layer):
        parameters = inspect.signature(layer.__init__).parameters.values()
        return [
            (parameter.name, parameter.default)
            for parameter in parameters
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ][2:]  # after `self` and `units`

    ours, theirs = positional(ScratchLSTM), positional(layers.LSTM)
    assert len(theirs) > 20
    assert ours[: len(theirs)] == theirs
    assert [name for name, _ in ours[len(theirs) :]] == ["time_major", "cell"]


def test_positional_arguments_do_the_same(draw):
    given = ["relu", "hard_sigmoid", False, "he_normal", "glorot_uniform", "ones"]
    x, results = draw(3, 7, 5), []
    for layer in (ScratchLSTM, layers.LSTM):
        keras.utils.set_random_seed(7)
        results.append(layer(6, *given, False, "l2", None, None, None)(x))
    assert_close(*results)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_bias": False},
        {"unit_forget_bias": False},
        {"bias_initializer": "random_normal"},
        {"kernel_initializer": "he_normal", "recurrent_initializer": "random_uniform"},
        {"dtype": "mixed_float16"},
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_weights(arguments):
    ours, theirs = pair(**arguments)
    for layer in (ours, theirs):
        layer.build((None, None, 5))
    for one, other in zip(fuse(ours.get_weights()), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": 0.4},
        {"recurrent_dropout": 0.4},
        {"dropout": 0.4, "recurrent_dropout": 0.3, "unroll": True},
        {"dropout": 0.4, "go_backwards": True},
    ],
    ids=str,
)
def test_the_same_seed_drops_the_same(draw, arguments):
    both = pair(seed=11, return_sequences=True, **arguments)
    x = draw(3, 7, 5)
    # Dropped out, not dropped out, and dropped out anew.
    results = [[layer(x, training=t) for t in (True, False, True)] for layer in both]
    assert_close(*results)
    dropped, whole, again = flat(results[0])
    assert not np.allclose(dropped, whole)
    assert not np.allclose(dropped, again)


def test_dropping_out_leaves_the_input_as_it_was(draw):
    x = ops.convert_to_tensor(draw(3, 7, 5))
    before = numpy(x).copy()
    ScratchLSTM(6, dropout=0.5)(x, training=True)
    np.testing.assert_array_equal(numpy(x), before)


def test_an_activity_regularizer(draw):
    ours, theirs = pair(activity_regularizer=keras.regularizers.L2(0.5))
    x = draw(3, 7, 5)
    losses = []
    for layer in (ours, theirs):
        output = numpy(layer(x))
        losses.append(numpy(layer.losses[0]))
        total = 0.5 * (output**2).sum()
        # Keras divides it by the batch size of 3; its early versions don't.
        assert np.isclose(losses[-1], [total, total / 3], rtol=1e-5).any()
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_regularizers_of_the_weights(draw):
    l2 = keras.regularizers.L2
    layer = ScratchLSTM(
        6,
        kernel_regularizer=l2(0.1),
        recurrent_regularizer={"f": l2(0.2)},
        bias_regularizer=l2(0.3),
    )
    layer.build((None, 7, 5))
    w = weights_of(layer.cell)
    expected = sum(0.1 * (w[f"W_x{gate}"] ** 2).sum() for gate in "ifoc")
    expected += 0.2 * (w["W_hf"] ** 2).sum() + 0.3 * (w["b_f"] ** 2).sum()
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, rtol=1e-5)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave", None])
def test_in_bidirectional_with_a_backward_twin(draw, merge_mode):
    ours, theirs = pair(
        lambda layer: layers.Bidirectional(layer, merge_mode=merge_mode),
        return_sequences=True,
    )
    x = draw(3, 7, 5)
    for layer in (ours, theirs):
        layer.build(x.shape)
    twin = ours.backward_layer
    assert isinstance(twin, ScratchLSTM)
    assert twin.go_backwards
    assert not ours.forward_layer.go_backwards
    assert not np.allclose(*(numpy(cell.W_xi) for cell in cells_of(ours)))
    for one, other in zip(cells_of(ours), cells_of(theirs), strict=True):
        other.set_weights(fuse(one.get_weights()))
    assert_close(ours(x), theirs(x))
    assert_close(ours(x, mask=GAPS), theirs(x, mask=GAPS))


def cells_of(bidirectional):
    return bidirectional.forward_layer.cell, bidirectional.backward_layer.cell


def test_in_bidirectional_with_states(draw):
    ours, theirs = pair(layers.Bidirectional, return_state=True)
    x, states = draw(3, 7, 5), [draw(3, 6) for _ in range(4)]
    outputs = [layer(x, initial_state=states) for layer in (ours, theirs)]
    assert len(outputs[0]) == 5
    for one, other in zip(cells_of(ours), cells_of(theirs), strict=True):
        other.set_weights(fuse(one.get_weights()))
    assert_close(ours(x, initial_state=states), theirs(x, initial_state=states))


# --- initial states ----------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_initial_states(draw, kind):
    layer = ScratchLSTM(6, return_sequences=True, return_state=True)
    x, h, c = draw(3, 7, 5), draw(3, 6), draw(3, 6)
    outputs = layer(x, initial_state=kind([h, c]))
    expected = lstm(x, weights_of(layer.cell), h, c)
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(numpy(output), value, atol=1e-6)


def test_an_encoder_hands_its_states_to_a_decoder(draw):
    keras.utils.set_random_seed(3)
    source, target = keras.Input((None, 5)), keras.Input((None, 4))
    encoder, decoder = ScratchLSTM(6, return_state=True), ScratchLSTM(6)
    _, *states = encoder(source)
    model = keras.Model([source, target], decoder(target, initial_state=states))
    x, y = draw(3, 7, 5), draw(3, 4, 4)
    _, h, c = lstm(x, weights_of(encoder.cell))
    _, expected, _ = lstm(y, weights_of(decoder.cell), h, c)
    np.testing.assert_allclose(model.predict([x, y], verbose=0), expected, atol=1e-6)
    before = encoder.get_weights()
    model.compile("sgd", "mse")
    model.fit([x, y], np.zeros((3, 6)), verbose=0)
    assert not np.allclose(before[0], encoder.get_weights()[0])


# --- states that are carried -------------------------------------------------


def stateful_model(batch_size=3, **arguments):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(batch_size, 7, 5)),
            ScratchLSTM(6, stateful=True, **arguments),
        ]
    )
    return model, model.layers[0]


def expected_states(x, cell, batch_size=3):
    """After batch upon batch, each from where the last one ended."""
    h = c = 0
    for start in range(0, len(x), batch_size):
        _, h, c = lstm(x[start : start + batch_size], weights_of(cell), h, c)
    return h, c


def assert_states(layer, expected, atol=1e-5):
    for state, value in zip(layer.states, expected, strict=True):
        np.testing.assert_allclose(numpy(state), value, atol=atol)


def test_a_stateful_layer_goes_on_where_the_last_call_ended(draw):
    layer = ScratchLSTM(6, stateful=True, return_sequences=True)
    x = draw(3, 14, 5)
    parts = [numpy(layer(x[:, :7])), numpy(layer(x[:, 7:]))]
    expected, h, c = lstm(x, weights_of(layer.cell))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-6)
    assert_states(layer, [h, c])
    layer.reset_state()
    assert not any(numpy(state).any() for state in layer.states)
    np.testing.assert_allclose(numpy(layer(x[:, :7])), parts[0], atol=1e-6)


def test_a_layer_that_is_not_stateful_starts_anew(draw):
    layer, x = ScratchLSTM(6), draw(3, 7, 5)
    assert layer.states is None
    np.testing.assert_array_equal(numpy(layer(x)), numpy(layer(x)))


def test_given_states_come_before_the_carried_ones(draw):
    layer = ScratchLSTM(6, stateful=True)
    x, h, c = draw(3, 7, 5), draw(3, 6), draw(3, 6)
    layer(x)
    _, expected, expected_c = lstm(x, weights_of(layer.cell), h, c)
    output = layer(x, initial_state=[h, c])
    np.testing.assert_allclose(numpy(output), expected, atol=1e-6)
    assert_states(layer, [expected, expected_c])


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_states_are_carried_from_batch_to_batch(draw, method):
    model, layer = stateful_model()
    x = draw(9, 7, 5)
    model.compile(keras.optimizers.SGD(0.0), "mse")  # the weights stay
    arguments = {"batch_size": 3, "verbose": 0}
    if method == "fit":
        arguments["shuffle"] = False
    if method != "predict":
        arguments["y"] = np.zeros((9, 6), "float32")
    getattr(model, method)(x, **arguments)
    assert_states(layer, expected_states(x, layer.cell))


def test_each_batch_trains_from_the_states_before_it(draw):
    """`fit` against a layer that is handed its states, step by step."""
    x, y = draw(9, 7, 5), draw(9, 6)
    model, layer = stateful_model()
    by_hand = ScratchLSTM(6, return_state=True)
    by_hand.build((3, 7, 5))
    by_hand.set_weights(layer.get_weights())
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, y, batch_size=3, shuffle=False, verbose=0)

    def loss_and_states(x, y, *states):
        output, *states = by_hand(x, initial_state=states)
        return ops.mean((output - y) ** 2), states

    step = with_gradients(loss_and_states, by_hand.trainable_variables)
    states = [np.zeros((3, 6), "float32")] * 2
    for start in range(0, 9, 3):
        batch = slice(start, start + 3)
        states, gradients = step(x[batch], y[batch], *states)
        weights = zip(by_hand.get_weights(), gradients[:12], strict=True)
        by_hand.set_weights([weight - 0.5 * dw for weight, dw in weights])
    assert_states(layer, states)
    for one, other in zip(layer.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_states_are_reset_between_epochs_by_a_callback(draw):
    x, y = draw(6, 7, 5), draw(6, 6)
    model, layer = stateful_model()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    reset = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: layer.reset_state()
    )
    history = model.fit(
        x, y, 3, epochs=2, shuffle=False, verbose=0, callbacks=[reset]
    ).history
    assert_states(layer, expected_states(x, layer.cell))
    np.testing.assert_allclose(*history["loss"], rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_states_are_carried_in_mixed_precision(draw, policy):
    model, layer = stateful_model(dtype=policy)
    x = draw(9, 7, 5)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, np.zeros((9, 6)), batch_size=3, shuffle=False, verbose=0)
    assert {state.dtype for state in layer.states} == {"float32"}
    tolerance = 5e-3 if policy == "mixed_float16" else 4e-2
    assert_states(layer, expected_states(x, layer.cell), tolerance)


def test_states_are_variables_but_no_weights():
    layer = ScratchLSTM(6, stateful=True)
    layer.build((3, 7, 5))
    assert [weight.name for weight in layer.weights] == NAMES
    assert [weight.name for weight in layer.trainable_variables] == NAMES
    for state in layer.states:
        assert state.shape == (3, 6)
        assert any(state is variable for variable in layer.variables)
        assert any(state is variable for variable in layer.non_trainable_variables)


def test_building_again_keeps_the_states_and_zeroes_them(draw):
    layer = ScratchLSTM(6, stateful=True)
    x = draw(3, 7, 5)
    layer(x)
    states = list(layer.states)
    layer.build(x.shape)
    assert all(a is b for a, b in zip(states, layer.states, strict=True))
    assert not any(numpy(state).any() for state in layer.states)


def test_a_stateful_bidirectional_carries_both_ways(draw):
    layer = layers.Bidirectional(ScratchLSTM(6, stateful=True), merge_mode=None)
    x = draw(3, 7, 5)
    layer(x)
    outputs = layer(x)
    for run, output in zip(
        (layer.forward_layer, layer.backward_layer), outputs, strict=True
    ):
        seen = x[:, ::-1] if run.go_backwards else x
        twice = np.concatenate([seen, seen], 1)
        _, expected, c = lstm(twice, weights_of(run.cell))
        np.testing.assert_allclose(numpy(output), expected, atol=1e-6)
        assert_states(run, [expected, c])


# --- masks -------------------------------------------------------------------


def test_a_mask_from_the_layer_before(draw):
    layer = ScratchLSTM(6, return_sequences=True)
    last = ScratchLSTM(4)
    model = keras.Sequential(
        [keras.Input((7, 5)), layers.Masking(mask_value=9.0), layer, last]
    )
    x = draw(3, 7, 5)
    masked = np.where(GAPS[:, :, None], x, 9).astype("float32")
    h_all, _, _ = lstm(x, weights_of(layer.cell), mask=GAPS)
    _, expected, _ = lstm(h_all, weights_of(last.cell), mask=GAPS)
    np.testing.assert_allclose(numpy(model(masked)), expected, atol=1e-6)


def test_the_mask_goes_on_with_sequences_alone():
    x, mask = keras.Input((7, 5)), np.ones((3, 7), bool)
    assert ScratchLSTM(6).compute_mask(x, mask) is None
    assert ScratchLSTM(6, return_sequences=True).compute_mask(x, mask) is mask
    both = ScratchLSTM(6, return_sequences=True, return_state=True)
    assert both.compute_mask(x, mask) == [mask, None, None]


def test_what_is_masked_trains_nothing(draw):
    layer = ScratchLSTM(6)
    x = draw(3, 7, 5)
    layer.build(x.shape)

    def loss(x):
        return ops.sum(layer(x, mask=MASK) ** 2), []

    _, gradients = with_gradients(loss, layer.trainable_variables)(x)
    assert abs(gradients[0]).max() > 0
    assert abs(gradients[-1][MASK]).min(-1).max() > 0
    assert not gradients[-1][~MASK].any()


def test_a_sequence_masked_in_full_leaves_the_states(draw):
    layer = ScratchLSTM(6, return_state=True)
    x, h, c = draw(3, 7, 5), draw(3, 6), draw(3, 6)
    _, *states = layer(x, initial_state=[h, c], mask=np.zeros((3, 7), bool))
    np.testing.assert_allclose(numpy(states[0]), h)
    np.testing.assert_allclose(numpy(states[1]), c)


# --- time first --------------------------------------------------------------


def swapped(x):
    return None if x is None else np.ascontiguousarray(np.swapaxes(x, 0, 1))


@pytest.mark.parametrize("stateful", [False, True], ids=["", "stateful"])
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
@pytest.mark.parametrize("mask", [None, GAPS], ids=["", "masked"])
def test_time_major(draw, mask, backwards, stateful):
    x, results = draw(3, 7, 5), []
    for time_major in (False, True):
        keras.utils.set_random_seed(3)
        layer = ScratchLSTM(
            6,
            time_major=time_major,
            return_sequences=True,
            return_state=True,
            go_backwards=backwards,
            stateful=stateful,
        )
        turn = swapped if time_major else np.asarray
        given = None if mask is None else turn(mask)
        for _ in range(2):
            outputs, *states = layer(turn(x), mask=given)
        results.append([turn(numpy(outputs)), *states])
    assert_close(*results)


def test_time_major_in_a_model_that_trains(draw):
    x, y = draw(3, 7, 5), draw(3, 7, 6)
    weights = []
    for time_major in (False, True):
        keras.utils.set_random_seed(3)
        turn = swapped if time_major else np.asarray
        layer = ScratchLSTM(6, time_major=time_major, return_sequences=True)
        inputs = keras.Input(batch_shape=turn(x).shape)
        states = [keras.Input(batch_shape=(3, 6)) for _ in "hc"]
        outputs = layer(layers.Masking()(inputs), initial_state=states)
        model = keras.Model([inputs, *states], outputs)
        model.compile(keras.optimizers.SGD(0.5), "mse")
        masked = turn(np.where(GAPS[:, :, None], x, 0).astype("float32"))
        data = [masked, np.ones((3, 6)), np.full((3, 6), 0.5)]
        model.train_on_batch(data, turn(y))
        weights.append(layer.get_weights())
    assert_close(*weights)


# --- a cell of one's own -----------------------------------------------------


@keras.saving.register_keras_serializable("test_layer")
class CoupledCell(ScratchLSTMCell):
    """Forgets as much as it takes in."""

    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


def test_a_cell_of_ones_own(draw):
    cell = CoupledCell(6)
    layer = ScratchLSTM(cell=cell, return_sequences=True, return_state=True)
    assert layer.cell is cell
    assert layer.units == 6
    x = draw(3, 7, 5)
    outputs = layer(x, mask=GAPS)
    rnn = layers.RNN(cell, return_sequences=True, return_state=True)
    assert_close(outputs, rnn(x, mask=GAPS))
    plain = ScratchLSTM(6, return_sequences=True)
    plain.build(x.shape)
    plain.set_weights(cell.get_weights())
    assert not np.allclose(numpy(plain(x, mask=GAPS)), numpy(outputs[0]))


def test_a_plain_cell_given_is_as_one_made(draw):
    x, results = draw(3, 7, 5), []
    for give in (lambda: {"units": 6}, lambda: {"cell": ScratchLSTMCell(6)}):
        keras.utils.set_random_seed(3)
        results.append(ScratchLSTM(**give())(x))
    assert_close(*results)


def test_a_cell_of_ones_own_trains_with_states_and_masks(draw):
    layer = ScratchLSTM(cell=CoupledCell(6), stateful=True, return_sequences=True)
    model = keras.Sequential(
        [keras.Input(batch_shape=(3, 7, 5)), layers.Masking(), layer, layers.Dense(1)]
    )
    # All but the forget gate's, which gets no gradient.
    for name in ("W_xf", "W_hf", "b_f"):
        getattr(layer.cell, name).trainable = False
    before = layer.get_weights()
    model.compile("sgd", "mse")
    model.fit(draw(9, 7, 5), draw(9, 7, 1), 3, shuffle=False, verbose=0)
    changed = [
        not np.array_equal(one, other)
        for one, other in zip(before, layer.get_weights(), strict=True)
    ]
    assert changed == [name[-1] != "f" for name in NAMES]
    assert all(numpy(state).any() for state in layer.states)


def test_bidirectional_copies_a_cell_of_ones_own(draw):
    layer = layers.Bidirectional(ScratchLSTM(cell=CoupledCell(6)), merge_mode=None)
    x = draw(3, 7, 5)
    outputs = layer(x)
    forward, backward = cells_of(layer)
    assert type(forward) is type(backward) is CoupledCell
    assert forward is not backward
    for cell, seen, output in zip(
        (forward, backward), (x, x[:, ::-1]), outputs, strict=True
    ):
        assert_close(layers.RNN(cell)(seen), output)


# --- configuration -----------------------------------------------------------


ARGUMENTS = {
    "units": 6,
    "activation": "relu",
    "recurrent_activation": "hard_sigmoid",
    "use_bias": True,
    "kernel_initializer": {"i": "zeros", "f": keras.initializers.Constant(0.5)},
    "recurrent_initializer": "he_normal",
    "bias_initializer": {"o": "ones"},
    "unit_forget_bias": False,
    "kernel_regularizer": {"c": keras.regularizers.L1(0.1)},
    "recurrent_regularizer": "l2",
    "bias_regularizer": {"i": "l1"},
    "activity_regularizer": "l2",
    "kernel_constraint": {"c": "non_neg"},
    "recurrent_constraint": keras.constraints.MaxNorm(2.0),
    "bias_constraint": {"f": "unit_norm"},
    "dropout": 0.25,
    "recurrent_dropout": 0.125,
    "seed": 5,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "unroll": True,
    "use_cudnn": False,
    "time_major": True,
    "name": "my_lstm",
    "dtype": "float32",
}
CELLS = [
    {"units": 6},
    ARGUMENTS,
    {"cell": CoupledCell(6, dropout=0.25, name="my_cell"), "time_major": True},
]


@pytest.mark.parametrize("arguments", CELLS, ids=["default", "full", "cell"])
def test_the_configuration_comes_back(arguments):
    layer = ScratchLSTM(**arguments)
    config = json.loads(json.dumps(layer.get_config()))
    assert set(arguments) <= set(config)
    again = ScratchLSTM.from_config(config)
    assert again.get_config() == config
    assert type(again.cell) is type(layer.cell)
    assert again.cell.get_config() == layer.cell.get_config()
    for name in ("stateful", "unroll", "time_major", "go_backwards", "use_cudnn"):
        assert getattr(again, name) == arguments.get(name, getattr(layer, name))


def test_the_full_configuration_names_every_argument():
    parameters = inspect.signature(ScratchLSTM.__init__).parameters
    missing = set(parameters) - set(ARGUMENTS)
    assert missing == {"self", "cell", "kwargs"}


def test_the_layer_answers_for_its_cell():
    layer = ScratchLSTM(**ARGUMENTS)
    for name in inspect.signature(ScratchLSTMCell.__init__).parameters:
        if name not in ("self", "kwargs"):
            assert getattr(layer, name) == getattr(layer.cell, name)
    assert layer.kernel_initializer["f"].value == 0.5
    assert layer.units == 6


def test_reading_a_configuration_leaves_it_as_it_was():
    config = ScratchLSTM(cell=CoupledCell(6)).get_config()
    before = json.dumps(config)
    ScratchLSTM.from_config(config)
    assert json.dumps(config) == before


def test_registered_under_the_packages_name():
    name = keras.saving.get_registered_name(ScratchLSTM)
    assert name == "keras_scratch_lstm>ScratchLSTM"


@pytest.mark.parametrize("trainable", [True, False])
def test_the_name_the_dtype_and_trainable_reach_the_cell(trainable):
    layer = ScratchLSTM(6, name="one", dtype="mixed_bfloat16", trainable=trainable)
    layer.build((None, 7, 5))
    assert layer.name == "one"
    assert layer.cell.compute_dtype == "bfloat16"
    assert len(layer.trainable_weights) == (12 if trainable else 0)
    assert all("one" in weight.path for weight in layer.weights)


# --- wrong input -------------------------------------------------------------


def sentence_of(call):
    """What a `ValueError` says, without the lines that Keras puts around it."""
    with pytest.raises(ValueError, match=r"expected|cuDNN") as error:
        call()
    message = str(error.value)
    if "\x1b[1m" in message:
        message = message.split("\x1b[1m")[1].split("\x1b[0m")[0]
    return message


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "`units` is None; expected a positive integer."),
        ({"units": -3}, "`units` is -3; expected a positive integer."),
        (
            {"units": 6, "dropout": 1.5},
            "`dropout` is 1.5; expected a number from 0 to 1.",
        ),
        (
            {"units": 6, "use_cudnn": "yes"},
            "`use_cudnn` is 'yes'; expected True, False or 'auto'.",
        ),
        (
            {"cell": 6},
            "`cell` is 6; expected a `ScratchLSTMCell` or an instance of a "
            "subclass. For other cells there is `keras.layers.RNN`.",
        ),
        (
            {"cell": ScratchLSTMCell(6), "units": 6},
            "`units` is 6 beside a `cell`; expected it to be left out, since it is "
            "the cell's to choose.",
        ),
        (
            {"cell": ScratchLSTMCell(6), "dropout": 0.5},
            "`dropout` is 0.5 beside a `cell`; expected it to be left out, since it "
            "is the cell's to choose.",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, sentence):
    assert sentence_of(lambda: ScratchLSTM(**arguments)) == sentence


def test_another_cell_is_refused():
    sentence = sentence_of(lambda: ScratchLSTM(cell=layers.LSTMCell(6)))
    assert sentence.startswith("`cell` is <LSTMCell name=")


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5, 2), (None, 7, None)])
@pytest.mark.parametrize("time_major", [False, True])
def test_wrong_shapes_to_build_with(shape, time_major):
    layer = ScratchLSTM(6, time_major=time_major, name="one")
    axes = "time, batch" if time_major else "batch, time"
    assert sentence_of(lambda: layer.build(shape)) == (
        f"`one` got `sequences` of shape {shape}; expected ({axes}, features) with "
        "known features."
    )
    assert not layer.weights
    layer.build((3, 7, 5))  # nothing is lost


@pytest.mark.parametrize("shape", [(3, 7, 6), (3, 5)])
def test_wrong_sequences_once_built(draw, shape):
    layer = ScratchLSTM(6)
    layer.build((None, None, 5))
    with pytest.raises(ValueError, match="is incompatible with the layer") as error:
        layer(draw(*shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 6)],
        [(3, 6)] * 3,
        [(3, 6), (3, 5)],
        [(3, 6), (6,)],
        [(2, 6), (2, 6)],
        [(1, 6), (1, 6)],
    ],
    ids=str,
)
def test_wrong_initial_states(draw, shapes):
    layer, x = ScratchLSTM(6, name="one"), draw(3, 7, 5)
    states = [draw(*shape) for shape in shapes]
    assert sentence_of(lambda: layer(x, initial_state=states)) == (
        f"`one` got `initial_state` of shapes {shapes}; expected [(3, 6), (3, 6)]."
    )


@pytest.mark.parametrize("shape", [(3, 6), (2, 7), (7, 3), (3,), (3, 7, 1)])
def test_a_wrong_mask(draw, shape):
    layer, x = ScratchLSTM(6, name="one"), draw(3, 7, 5)
    assert sentence_of(lambda: layer(x, mask=np.ones(shape, bool))) == (
        f"`one` got `mask` of shape {shape}; expected (3, 7), as the `sequences` "
        "have it."
    )


def test_a_wrong_mask_with_the_time_first(draw):
    layer, x = ScratchLSTM(6, name="one", time_major=True), draw(7, 3, 5)
    assert sentence_of(lambda: layer(x, mask=np.ones((3, 7), bool))) == (
        "`one` got `mask` of shape (3, 7); expected (7, 3), as the `sequences` have it."
    )


@pytest.mark.parametrize("time_major", [False, True])
def test_a_stateful_layer_needs_a_known_batch_size(time_major):
    layer = ScratchLSTM(6, stateful=True, name="one", time_major=time_major)
    x = keras.Input(batch_shape=(7, None, 5) if time_major else (None, 7, 5))
    assert sentence_of(lambda: layer(x)) == (
        "`one` is stateful and got `sequences` of shape (None, 7, 5); expected a "
        "known batch size, as with `keras.Input(batch_shape=(32, None, 8))`."
    )
    assert not layer.weights


def test_a_stateful_layer_keeps_its_batch_size(draw):
    layer = ScratchLSTM(6, stateful=True, name="one")
    layer(draw(3, 7, 5))
    states = flat(layer.states)
    assert sentence_of(lambda: layer(draw(2, 7, 5))) == (
        "`one` is stateful and got `sequences` with a batch size of 2; expected 3, "
        "the batch size of its states."
    )
    assert_close(layer.states, states)


@pytest.mark.parametrize("change", ["number", "shape"])
def test_wrong_weights_change_nothing(change):
    layer = ScratchLSTM(6)
    layer.build((None, 7, 5))
    before = layer.get_weights()
    weights = [weight + 1 for weight in before]
    if change == "number":
        sentence = f"`lstm_cell` got 11 `weights`; expected 12: {', '.join(NAMES)}."
        weights.pop()
    else:
        sentence = "`lstm_cell` got `weights` with b_c of shape (5,); expected (6,)."
        weights[-1] = np.ones(5)
    assert sentence_of(lambda: layer.set_weights(weights)) == sentence
    for one, other in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_of_another_shape_are_not_loaded(tmp_path):
    def model(units):
        return keras.Sequential([keras.Input((7, 5)), ScratchLSTM(units)])

    model(6).save_weights(tmp_path / "six.weights.h5")
    other = model(4)
    before = other.get_weights()
    sentence = "`lstm_cell` got `weights` with W_xi of shape (5, 6); expected (5, 4)."
    assert sentence in sentence_of(
        lambda: other.load_weights(tmp_path / "six.weights.h5")
    )
    for one, after in zip(before, other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, after)


def test_cudnn_where_there_is_none(draw):
    layer = ScratchLSTM(6, use_cudnn=True, activation="relu", name="one")
    sentence = sentence_of(lambda: layer(draw(3, 7, 5)))
    assert sentence.startswith("`use_cudnn` is True, but `one` can't run in cuDNN")
    assert "\n" not in sentence
