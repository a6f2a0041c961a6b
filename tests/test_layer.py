import inspect
import re
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from gradients import BACKEND, with_gradients
from keras import layers, ops
from reference import NAMES, fuse, label, lstm, weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence

numpy = ops.convert_to_numpy


def flat(outputs):
    return [numpy(output) for output in keras.tree.flatten(outputs)]


def assert_close(ours, theirs, atol=1e-5):
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert np.ptp(other) > 0  # not all masked or dropped
        np.testing.assert_allclose(one, other, atol=atol)


def assert_matches(outputs, expected, atol=1e-6):
    """Tensors against arrays of the NumPy reference."""
    for output, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(numpy(output), value, atol=atol)


@pytest.fixture
def draw(rng):
    return lambda *shape: rng.normal(size=shape).astype("float32")


PADDED = np.arange(7) < np.array([[7], [4], [1]])
GAPS = np.array([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1], [1] * 7], bool)
LEADING = np.array([[0, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1], [0] * 7], bool)
MASK_IDS = ["unmasked", "gaps", "padded", "leading"]


# --- the equations -----------------------------------------------------------


@pytest.mark.parametrize("mask", [None, GAPS, PADDED, LEADING], ids=MASK_IDS)
@pytest.mark.parametrize(
    "arguments", [{}, {"unroll": True}, {"use_bias": False}, {"go_backwards": True}]
)
def test_sequence_matches_numpy_reference(draw, arguments, mask):
    layer = ScratchLSTM(
        6,
        bias_initializer="random_normal",
        return_sequences=True,
        return_state=True,
        **arguments,
    )
    x = draw(3, 7, 5)
    outputs = layer(x, mask=mask)
    if layer.go_backwards:
        x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
    assert_matches(outputs, lstm(x, weights_of(layer.cell), mask=mask))


def test_return_sequences_and_return_state(draw):
    x, results = draw(3, 7, 5), {}
    for sequences in (False, True):
        for state in (False, True):
            keras.utils.set_random_seed(3)
            layer = ScratchLSTM(6, return_sequences=sequences, return_state=state)
            results[sequences, state] = flat(layer(x))
    (h_all, h, c) = results[True, True]
    assert h_all.shape == (3, 7, 6)
    assert h.shape == c.shape == (3, 6)
    np.testing.assert_array_equal(h_all[:, -1], h)
    expected = {(False, False): [h], (True, False): [h_all], (False, True): [h, h, c]}
    for key, values in expected.items():
        assert_matches(results[key], values)


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


def copy_weights(ours, theirs):
    for one, other in zip(cells_of(ours), cells_of(theirs), strict=True):
        other.set_weights(fuse(one.get_weights()))


def cells_of(bidirectional):
    return bidirectional.forward_layer.cell, bidirectional.backward_layer.cell


def test_signature_is_that_of_the_built_in_layer(draw):
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
    given = ["relu", "hard_sigmoid", False, "he_normal", "glorot_uniform", "ones"]
    x, results = draw(3, 7, 5), []
    for layer in (ScratchLSTM, layers.LSTM):
        keras.utils.set_random_seed(7)
        results.append(layer(6, *given, False, "l2", None, None, None)(x))
    assert_close(*results)


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
def test_same_seed_gives_the_same_dropout_masks(draw, arguments):
    both = pair(seed=11, return_sequences=True, **arguments)
    x = ops.convert_to_tensor(draw(3, 7, 5))
    before = numpy(x).copy()
    results = [[layer(x, training=t) for t in (True, False, True)] for layer in both]
    assert_close(*results)
    first, without, second = flat(results[0])
    assert not np.allclose(first, without)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(numpy(x), before)  # not dropped in place


def test_activity_regularizer(draw):
    ours, theirs = pair(activity_regularizer=keras.regularizers.L2(0.5))
    x = draw(3, 7, 5)
    losses = []
    for layer in (ours, theirs):
        output = numpy(layer(x))
        losses.append(numpy(layer.losses[0]))
        total = 0.5 * (output**2).sum()
        # Keras divides by the batch size; its early versions do not.
        assert np.isclose(losses[-1], [total, total / 3], rtol=1e-5).any()
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave", None])
def test_bidirectional_matches_the_built_in_layer(draw, merge_mode):
    ours, theirs = pair(
        lambda layer: layers.Bidirectional(layer, merge_mode=merge_mode),
        return_sequences=True,
    )
    x = draw(3, 7, 5)
    for layer in (ours, theirs):
        layer.build(x.shape)
    assert isinstance(ours.backward_layer, ScratchLSTM)
    assert ours.backward_layer.go_backwards
    assert not ours.forward_layer.go_backwards
    assert not np.allclose(*(numpy(cell.W_xi) for cell in cells_of(ours)))
    copy_weights(ours, theirs)
    assert_close(ours(x), theirs(x))
    assert_close(ours(x, mask=GAPS), theirs(x, mask=GAPS))


def test_bidirectional_with_initial_states(draw):
    ours, theirs = pair(layers.Bidirectional, return_state=True)
    x, states = draw(3, 7, 5), [draw(3, 6) for _ in range(4)]
    outputs = [layer(x, initial_state=states) for layer in (ours, theirs)]
    assert len(outputs[0]) == 5
    copy_weights(ours, theirs)
    assert_close(ours(x, initial_state=states), theirs(x, initial_state=states))


# --- initial states ----------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple])
def test_initial_states_match_numpy_reference(draw, kind):
    layer = ScratchLSTM(6, return_sequences=True, return_state=True)
    x, h, c = draw(3, 7, 5), draw(3, 6), draw(3, 6)
    outputs = layer(x, initial_state=kind([h, c]))
    assert_matches(outputs, lstm(x, weights_of(layer.cell), h, c))


def test_encoder_and_decoder_match_numpy_reference(draw):
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


# --- stateful layers ---------------------------------------------------------


def stateful_model(batch_size=3, **arguments):
    layer = ScratchLSTM(6, stateful=True, **arguments)
    model = keras.Sequential([keras.Input(batch_shape=(batch_size, 7, 5)), layer])
    return model, layer


def expected_states(x, cell, batch_size=3):
    """The states after all batches, each from the states of the previous one."""
    h = c = 0
    for start in range(0, len(x), batch_size):
        _, h, c = lstm(x[start : start + batch_size], weights_of(cell), h, c)
    return h, c


def test_stateful_layer_resumes_from_the_last_states(draw):
    layer = ScratchLSTM(6, stateful=True, return_sequences=True)
    x = draw(3, 14, 5)
    parts = [numpy(layer(x[:, :7])), numpy(layer(x[:, 7:]))]
    expected, h, c = lstm(x, weights_of(layer.cell))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-6)
    assert_matches(layer.states, [h, c])
    layer.reset_state()
    assert not any(numpy(state).any() for state in layer.states)
    np.testing.assert_allclose(numpy(layer(x[:, :7])), parts[0], atol=1e-6)
    stateless = ScratchLSTM(6)
    assert stateless.states is None
    np.testing.assert_array_equal(numpy(stateless(x)), numpy(stateless(x)))


def test_initial_state_takes_precedence_over_the_last_states(draw):
    layer = ScratchLSTM(6, stateful=True)
    x, h, c = draw(3, 7, 5), draw(3, 6), draw(3, 6)
    layer(x)
    _, expected, expected_c = lstm(x, weights_of(layer.cell), h, c)
    output = layer(x, initial_state=[h, c])
    np.testing.assert_allclose(numpy(output), expected, atol=1e-6)
    assert_matches(layer.states, [expected, expected_c])


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [("float32", 1e-5), ("mixed_float16", 5e-3), ("mixed_bfloat16", 4e-2)],
)
def test_states_pass_from_batch_to_batch(draw, method, policy, tolerance):
    model, layer = stateful_model(dtype=policy)
    x = draw(9, 7, 5)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    arguments = {"batch_size": 3, "verbose": 0}
    if method == "fit":
        arguments["shuffle"] = False
    if method != "predict":
        arguments["y"] = np.zeros((9, 6), "float32")
    getattr(model, method)(x, **arguments)
    assert {state.dtype for state in layer.states} == {"float32"}
    assert_matches(layer.states, expected_states(x, layer.cell), tolerance)


def test_training_a_stateful_layer_is_truncated_bptt(draw):
    """`fit` against a layer that receives the states of each previous batch."""
    x, y = draw(9, 7, 5), draw(9, 6)
    model, layer = stateful_model()
    reference = ScratchLSTM(6, return_state=True)
    reference.build((3, 7, 5))
    reference.set_weights(layer.get_weights())
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(x, y, batch_size=3, shuffle=False, verbose=0)

    def loss_and_states(x, y, *states):
        output, *states = reference(x, initial_state=states)
        return ops.mean((output - y) ** 2), states

    step = with_gradients(loss_and_states, reference.trainable_variables)
    states = [np.zeros((3, 6), "float32")] * 2
    for start in range(0, 9, 3):
        batch = slice(start, start + 3)
        states, gradients = step(x[batch], y[batch], *states)
        weights = zip(reference.get_weights(), gradients[:12], strict=True)
        reference.set_weights([weight - 0.5 * dw for weight, dw in weights])
    assert_matches(layer.states, states, 1e-5)
    assert_matches(layer.weights, reference.get_weights(), 1e-5)


def test_states_are_variables_and_not_weights():
    layer = ScratchLSTM(6, stateful=True)
    layer.build((3, 7, 5))
    assert [weight.name for weight in layer.weights] == NAMES
    assert [weight.name for weight in layer.trainable_variables] == NAMES
    for state in layer.states:
        assert state.shape == (3, 6)
        assert any(state is variable for variable in layer.variables)
        assert any(state is variable for variable in layer.non_trainable_variables)


def test_building_again_resets_the_states(draw):
    layer = ScratchLSTM(6, stateful=True)
    x = draw(3, 7, 5)
    layer(x)
    states = list(layer.states)
    layer.build(x.shape)
    assert all(a is b for a, b in zip(states, layer.states, strict=True))
    assert not any(numpy(state).any() for state in layer.states)


def test_stateful_bidirectional_matches_numpy_reference(draw):
    layer = layers.Bidirectional(ScratchLSTM(6, stateful=True), merge_mode=None)
    x = draw(3, 7, 5)
    layer(x)
    directions = (layer.forward_layer, layer.backward_layer)
    for direction, output in zip(directions, layer(x), strict=True):
        x_seen = x[:, ::-1] if direction.go_backwards else x
        twice = np.concatenate([x_seen, x_seen], 1)
        _, expected, c = lstm(twice, weights_of(direction.cell))
        np.testing.assert_allclose(numpy(output), expected, atol=1e-6)
        assert_matches(direction.states, [expected, c])


# --- masks -------------------------------------------------------------------


def test_mask_of_the_previous_layer(draw):
    layer, last = ScratchLSTM(6, return_sequences=True), ScratchLSTM(4)
    model = keras.Sequential(
        [keras.Input((7, 5)), layers.Masking(mask_value=9.0), layer, last]
    )
    x = draw(3, 7, 5)
    masked = np.where(GAPS[:, :, None], x, 9).astype("float32")
    h_all, _, _ = lstm(x, weights_of(layer.cell), mask=GAPS)
    _, expected, _ = lstm(h_all, weights_of(last.cell), mask=GAPS)
    np.testing.assert_allclose(numpy(model(masked)), expected, atol=1e-6)


def without_masking(init):
    """`RNN.__init__` as of Keras 3.16."""

    def initialize(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.supports_masking = False

    return initialize


@pytest.mark.parametrize("cell", [None, ScratchLSTMCell])
@pytest.mark.parametrize("base_class_masks", [True, False])
def test_mask_reaches_the_loss_and_the_metrics(
    draw, rng, monkeypatch, base_class_masks, cell
):
    if not base_class_masks:
        init = without_masking(layers.RNN.__init__)
        monkeypatch.setattr(layers.RNN, "__init__", init)
        assert not layers.RNN(ScratchLSTMCell(6)).supports_masking
    arguments = {"cell": cell(6)} if cell else {"units": 6}
    layer = ScratchLSTM(**arguments, return_sequences=True)
    assert layer.supports_masking is True
    model = keras.Sequential(
        [keras.Input((7,)), layers.Embedding(9, 5, mask_zero=True), layer]
    )
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    tokens = rng.integers(1, 9, size=(3, 7))
    tokens[~GAPS] = 0
    y = draw(3, 7, 6)
    results = model.evaluate(tokens, y, verbose=0, return_dict=True)
    error = (model.predict(tokens, verbose=0) - y)[GAPS]
    # Whether Keras divides the loss by all or by the unmasked time steps depends on
    # its version; the metric is the mean over the unmasked ones.
    np.testing.assert_allclose(results["mae"], abs(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(results["loss"], (error**2).mean(), rtol=1e-5)


def test_compute_mask():
    x, mask = keras.Input((7, 5)), np.ones((3, 7), bool)
    assert ScratchLSTM(6).compute_mask(x, mask) is None
    assert ScratchLSTM(6, return_sequences=True).compute_mask(x, mask) is mask
    both = ScratchLSTM(6, return_sequences=True, return_state=True)
    assert both.compute_mask(x, mask) == [mask, None, None]


def test_masked_time_steps_have_no_gradient(draw):
    layer = ScratchLSTM(6)
    x = draw(3, 7, 5)
    layer.build(x.shape)

    def loss(x):
        return ops.sum(layer(x, mask=PADDED) ** 2), []

    _, gradients = with_gradients(loss, layer.trainable_variables)(x)
    assert abs(gradients[0]).max() > 0
    assert abs(gradients[-1][PADDED]).min(-1).max() > 0
    assert not gradients[-1][~PADDED].any()


def test_fully_masked_sequence_leaves_the_states_unchanged(draw):
    layer = ScratchLSTM(6, return_state=True)
    x, h, c = draw(3, 7, 5), draw(3, 6), draw(3, 6)
    _, *states = layer(x, initial_state=[h, c], mask=np.zeros((3, 7), bool))
    assert_matches(states, [h, c], 0)


# --- time-major --------------------------------------------------------------


def swapped(x):
    return None if x is None else np.ascontiguousarray(np.swapaxes(x, 0, 1))


@pytest.mark.parametrize("zero_output", [False, True], ids=["", "zero_output"])
@pytest.mark.parametrize("stateful", [False, True], ids=["", "stateful"])
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
@pytest.mark.parametrize("mask", [None, GAPS], ids=["", "masked"])
def test_time_major_matches_batch_major(draw, mask, backwards, stateful, zero_output):
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
            zero_output_for_mask=zero_output,
        )
        swap = swapped if time_major else np.asarray
        for _ in range(2):
            outputs, *states = layer(swap(x), mask=None if mask is None else swap(mask))
        results.append([swap(numpy(outputs)), *states])
    assert_close(*results)
    if mask is not None:
        masked = results[1][0][~(mask[:, ::-1] if backwards else mask)]
        assert masked.any() != zero_output


@pytest.mark.parametrize("merge_mode", ["concat", "sum", None])
@pytest.mark.parametrize("return_state", [False, True])
def test_time_major_in_bidirectional(draw, merge_mode, return_state):
    """Right without sequences, and rejected with them, as Keras flips axis 1."""
    arguments = {"time_major": True, "return_state": return_state}
    for given in (
        {"layer": ScratchLSTM(6, return_sequences=True, **arguments)},
        {
            "layer": ScratchLSTM(6, return_sequences=True, return_state=return_state),
            "backward_layer": ScratchLSTM(
                6, return_sequences=True, go_backwards=True, **arguments
            ),
        },
    ):
        with pytest.raises(ValueError, match="`time_major` must be False within"):
            layers.Bidirectional(merge_mode=merge_mode, **given)
    layer = layers.Bidirectional(ScratchLSTM(6, **arguments), merge_mode=merge_mode)
    x = draw(3, 7, 5)
    outputs = flat(layer(swapped(x)))
    forward, backward = (weights_of(cell) for cell in cells_of(layer))
    _, h, c = lstm(x, forward)
    _, h_back, c_back = lstm(x[:, ::-1], backward)
    expected = {
        "concat": [np.concatenate([h, h_back], -1)],
        "sum": [h + h_back],
        None: [h, h_back],
    }[merge_mode]
    expected += [h, c, h_back, c_back] if return_state else []
    assert_matches(outputs, expected)


# --- custom cells ------------------------------------------------------------


@keras.saving.register_keras_serializable("test_layer")
class CoupledCell(ScratchLSTMCell):
    """Its forget gate is `1 - i`."""

    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


@keras.saving.register_keras_serializable("test_layer")
class ScaledCell(ScratchLSTMCell):
    """Its output is not `h`."""

    def call(self, inputs, states, training=False):
        h, states = super().call(inputs, states, training)
        return 2 * h + 1, states


def test_custom_cell_matches_keras_rnn(draw):
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


def scaled_reference(x, w, mask, go_backwards, zero_output):
    """Outputs, the last output and the states of a `ScaledCell`."""
    if go_backwards:
        x, mask = x[:, ::-1], mask[:, ::-1]
    h, c, output = (np.zeros((len(x), 6)) for _ in range(3))
    outputs = []
    for t in range(x.shape[1]):
        h_all, _, c_new = lstm(x[:, t, None], w, h, c)
        unmasked = mask[:, t, None]
        h = np.where(unmasked, h_all[:, 0], h)
        c = np.where(unmasked, c_new, c)
        output = np.where(unmasked, 2 * h + 1, 0 if zero_output else output)
        outputs.append(output)
    return np.stack(outputs, 1), h, c


@pytest.mark.parametrize("mask", [None, GAPS, PADDED, LEADING], ids=MASK_IDS)
@pytest.mark.parametrize("unroll", [False, True], ids=["", "unrolled"])
@pytest.mark.parametrize("zero_output", [False, True], ids=["", "zero_output"])
@pytest.mark.parametrize("time_major", [False, True], ids=["", "time_major"])
@pytest.mark.parametrize("backwards", [False, True], ids=["", "backwards"])
@pytest.mark.parametrize("sequences", [False, True], ids=["last", "sequences"])
def test_output_of_a_custom_cell_with_masks(
    draw, mask, unroll, zero_output, time_major, backwards, sequences
):
    if unroll and backwards:
        pytest.skip("in Keras, unrolling backwards with a mask is wrong or fails")
    if unroll and zero_output and BACKEND == "jax":
        pytest.skip("on JAX, Keras ignores `zero_output_for_mask` if unrolled")
    layer = ScratchLSTM(
        cell=ScaledCell(6),
        return_sequences=sequences,
        return_state=True,
        go_backwards=backwards,
        unroll=unroll,
        time_major=time_major,
        zero_output_for_mask=zero_output,
    )
    x = draw(3, 7, 5)
    swap = swapped if time_major else np.asarray
    outputs, h, c = flat(layer(swap(x), mask=None if mask is None else swap(mask)))
    mask = np.ones((3, 7), bool) if mask is None else mask
    expected, *states = scaled_reference(
        x, weights_of(layer.cell), mask, backwards, zero_output
    )
    assert_matches(
        [swap(outputs) if sequences else outputs, h, c],
        [expected if sequences else expected[:, -1], *states],
    )


def test_bidirectional_copies_a_custom_cell(draw):
    layer = layers.Bidirectional(ScratchLSTM(cell=CoupledCell(6)), merge_mode=None)
    x = draw(3, 7, 5)
    outputs = layer(x)
    forward, backward = cells_of(layer)
    assert type(forward) is type(backward) is CoupledCell
    assert forward is not backward
    for cell, x_seen, output in zip(
        (forward, backward), (x, x[:, ::-1]), outputs, strict=True
    ):
        assert_close(layers.RNN(cell)(x_seen), output)


# --- GPUs --------------------------------------------------------------------


def cudnn_stand_in(calls):
    """A function as `_keras.lstm`: like cuDNN's, its ops have no XLA kernel."""
    import tensorflow as tf

    def lstm(x, h, c, mask, kernel, recurrent_kernel, bias, **arguments):
        assert mask is None
        calls.append(x.shape)
        x = tf.ensure_shape(tf.py_function(lambda x: x, [x], x.dtype), x.shape)
        h_all = tf.TensorArray(x.dtype, 7)
        for t in range(7):
            z = x[:, t] @ kernel + h @ recurrent_kernel + bias
            i, f, c_tilde, o = tf.split(z, 4, -1)
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(c_tilde)
            h = tf.sigmoid(o) * tf.tanh(c)
            h_all = h_all.write(t, h)
        h_all = tf.transpose(h_all.stack(), (1, 0, 2))
        return h, tf.reshape(h_all, (-1, 7, 6)), [h, c]

    return lstm


@pytest.fixture
def mocked_gpu(monkeypatch):
    """Calls of cuDNN, on a host that seems to have a GPU."""
    if BACKEND != "tensorflow":
        pytest.skip("only TensorFlow compiles cuDNN ops by XLA")
    import tensorflow as tf

    import keras_scratch_lstm.recurrence.tensorflow as backend
    from keras_scratch_lstm import _keras

    calls, gpu = [], SimpleNamespace(device_type="GPU")
    devices = tf.config.list_physical_devices
    # Keras compiles by XLA only where there is a GPU.
    monkeypatch.setattr(
        tf.config,
        "list_physical_devices",
        lambda *kind: devices(*kind) + ([] if kind else [gpu]),
    )
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    monkeypatch.setattr(_keras, "lstm", cudnn_stand_in(calls))
    return calls


WITH_CUDNN = [
    {},
    {"cell": ScratchLSTMCell(6)},
    {"recurrent_dropout": 0.5},  # in inference
    {"stateful": True, "go_backwards": True},
    {"use_cudnn": True},
]
WITHOUT_CUDNN = [
    {"use_cudnn": False},
    {"unroll": True},
    {"use_bias": False},
    {"activation": "relu"},
    {"recurrent_activation": "hard_sigmoid"},
    {"cell": CoupledCell(6)},
    {"cell": ScaledCell(6)},
]


@pytest.mark.parametrize("arguments", [*WITH_CUDNN, *WITHOUT_CUDNN], ids=label)
def test_supports_jit_on_a_gpu(mocked_gpu, arguments):
    supports_jit = arguments in WITHOUT_CUDNN
    layer = ScratchLSTM(**({} if "cell" in arguments else {"units": 6}) | arguments)
    assert layer.supports_jit is supports_jit
    restored = ScratchLSTM.from_config(layer.get_config())
    assert restored.supports_jit is supports_jit
    model = keras.Sequential([keras.Input(batch_shape=(4, 7, 5)), layer])
    model.compile("sgd", "mse")
    assert model.jit_compile is supports_jit


@pytest.mark.skipif("cudnn" in recurrence.implementations(), reason="needs no GPU")
def test_supports_jit_without_a_gpu():
    for use_cudnn in (True, False, "auto"):
        assert ScratchLSTM(6, use_cudnn=use_cudnn).supports_jit


@pytest.mark.parametrize(
    ("arguments", "uses_cudnn"),
    [
        ({}, True),
        ({"stateful": True, "go_backwards": True}, True),
        ({"dropout": 0.3, "seed": 3}, True),
        ({"recurrent_dropout": 0.3, "seed": 3}, True),
        ({"use_cudnn": True}, True),
        ({"bidirectional": True}, True),
        ({"use_cudnn": False}, False),
        ({"use_bias": False}, False),
    ],
    ids=str,
)
def test_models_on_a_gpu_give_the_results_of_the_cpu(
    rng, mocked_gpu, monkeypatch, arguments, uses_cudnn
):
    import keras_scratch_lstm.recurrence.tensorflow as backend

    x, y = rng.normal(size=(8, 7, 5)), rng.normal(size=(8, 1))
    wrap = layers.Bidirectional if "bidirectional" in arguments else lambda layer: layer
    arguments = {k: v for k, v in arguments.items() if k != "bidirectional"}
    results = []
    for on_gpu in (True, False):
        monkeypatch.setattr(backend, "has_gpu", lambda on_gpu=on_gpu: on_gpu)
        if not on_gpu:
            arguments = {k: v for k, v in arguments.items() if k != "use_cudnn"}
        keras.utils.set_random_seed(3)
        layer = wrap(ScratchLSTM(6, **arguments))
        model = keras.Sequential([keras.Input(batch_shape=(4, 7, 5)), layer])
        # In XLA, equal seeds give other dropout masks.
        jit_compile = "auto" if on_gpu else False
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)
        data = {"batch_size": 4, "verbose": 0}
        history = model.fit(x, y, epochs=2, shuffle=False, **data).history["loss"]
        loss = model.evaluate(x, y, **data)
        predictions = model.predict(x, **data)
        results.append([history, loss, predictions, *model.trainable_weights])
        assert bool(mocked_gpu) == uses_cudnn  # the second run adds no calls
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)


def test_masks_on_a_gpu_run_without_cudnn(draw, mocked_gpu):
    layer = ScratchLSTM(6, return_sequences=True, return_state=True)
    x = draw(3, 7, 5)
    outputs = layer(x, mask=GAPS)
    assert not mocked_gpu
    assert layer.recurrence == "tensorflow"
    assert_matches(outputs, lstm(x, weights_of(layer.cell), mask=GAPS))
    assert_matches(layer(x), lstm(x, weights_of(layer.cell)))
    assert layer.recurrence == "cudnn"


@pytest.mark.parametrize("trainable", [True, False])
def test_name_dtype_and_trainable_reach_the_cell(trainable):
    layer = ScratchLSTM(6, name="one", dtype="mixed_bfloat16", trainable=trainable)
    layer.build((None, 7, 5))
    assert layer.name == "one"
    assert layer.cell.compute_dtype == "bfloat16"
    assert len(layer.trainable_weights) == (12 if trainable else 0)
    assert all("one" in weight.path for weight in layer.weights)


# --- errors ------------------------------------------------------------------


CELL_ARGUMENTS = [
    ("units", 6),
    ("dropout", 0.5),
    ("use_bias", np.zeros(2)),
    ("kernel_initializer", {"f": "zeros"}),
    ("activation", keras.ops.relu),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": None}, "`units` must be a positive integer. Received: units=None"),
        *(
            (
                {"units": 6, "use_cudnn": value},
                "`use_cudnn` must be True, False or 'auto'. Received: use_cudnn=",
            )
            for value in ("yes", None, 2)
        ),
        *(
            (
                {"cell": cell},
                "`cell` must be a `ScratchLSTMCell` or an instance of a subclass. "
                "Received: cell=",
            )
            for cell in (6, "cell", ScratchLSTMCell, layers.LSTMCell(6), [])
        ),
        *(
            (
                {"cell": ScratchLSTMCell(6), name: value},
                f"`{name}` must not be passed together with `cell`. Received: {name}=",
            )
            for name, value in CELL_ARGUMENTS
        ),
    ],
    ids=label,
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + ".{0,150}$"):
        ScratchLSTM(**arguments)


NO_STEPS = "`sequences` must have at least one time step"
MASK = "`mask` must have the shape "
NUMBER = "`initial_state` must be a list of 2 tensors. Received: "
STATE = "`initial_state` must have the shape (3, 6). Received: "
INPUT = "is incompatible with the layer"
STATEFUL = "`sequences` must have the batch size 3, since `one` is stateful. "


@pytest.mark.parametrize(
    ("arguments", "call", "message"),
    [
        ({}, {"shape": (3, 0, 5)}, NO_STEPS),
        ({}, {"mask": (3, 6)}, MASK + "(3, 7). Received: (3, 6)"),
        ({}, {"mask": (7, 3)}, MASK + "(3, 7). Received: (7, 3)"),
        ({}, {"mask": (3,)}, MASK + "(3, 7). Received: (3,)"),
        ({}, {"mask": (3, 7, 1)}, MASK + "(3, 7). Received: (3, 7, 1)"),
        ({"time_major": True}, {"mask": (3, 7)}, MASK + "(7, 3). Received: (3, 7)"),
        ({}, {"states": [(3, 6)]}, NUMBER + "1"),
        ({}, {"states": [(3, 6)] * 3}, NUMBER + "3"),
        ({}, {"states": [(3, 6), (3, 5)]}, STATE + "(3, 5)"),
        ({}, {"states": [(3, 6), (6,)]}, STATE + "(6,)"),
        ({}, {"states": [(2, 6)] * 2}, STATE + "(2, 6)"),
        ({}, {"states": [(1, 6)] * 2}, STATE + "(1, 6)"),
        ({"stateful": True}, {"shape": (2, 7, 5)}, STATEFUL),
        ({}, {"shape": (3, 7, 4)}, INPUT),
        ({}, {"shape": (3, 5)}, INPUT),
    ],
    ids=str,
)
def test_invalid_inputs(draw, arguments, call, message):
    layer = ScratchLSTM(6, name="one", **arguments)
    shape = (7, 3, 5) if layer.time_major else (3, 7, 5)
    layer(draw(*shape))
    states = [numpy(state) for state in layer.states or []]
    given = {"sequences": draw(*call.get("shape", shape))}
    if "mask" in call:
        given["mask"] = np.ones(call["mask"], bool)
    if "states" in call:
        given["initial_state"] = [draw(*shape) for shape in call["states"]]
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(**given)
    assert_matches(layer.states or [], states, 0)


@pytest.mark.parametrize("time_major", [False, True])
def test_stateful_layer_needs_a_known_batch_size(time_major):
    layer = ScratchLSTM(6, stateful=True, time_major=time_major)
    x = keras.Input(batch_shape=(7, None, 5) if time_major else (None, 7, 5))
    with pytest.raises(ValueError, match=r"stateful.*batch size"):
        layer(x)


@pytest.mark.skipif("cudnn" in recurrence.implementations(), reason="needs no GPU")
@pytest.mark.parametrize("arguments", [{}, {"activation": "relu"}, {"unroll": True}])
def test_use_cudnn_without_a_gpu(draw, arguments):
    layer = ScratchLSTM(6, use_cudnn=True, name="one", **arguments)
    message = "`use_cudnn` must be 'auto' or False where .*`one` with use_cudnn=True"
    with pytest.raises(ValueError, match=message):
        layer(draw(3, 7, 5))
