import inspect
import re

import keras
import numpy as np
import pytest
from custom_cells import ScaledCell
from gradients import BACKEND
from keras import layers, ops
from reference import NAMES, assert_close, label, lstm, weights_of

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence

numpy = ops.convert_to_numpy
SLOW = pytest.mark.slow


PADDED = np.arange(7) < np.array([[7], [4], [1]])
GAPS = np.array([[1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1], [1] * 7], bool)
LEADING = np.array([[0, 0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0, 1], [0] * 7], bool)
MASK_IDS = ["unmasked", "gaps", "padded", "leading"]
RETURNS = {"return_sequences": True, "return_state": True}


@pytest.mark.parametrize("mask", [None, GAPS, PADDED, LEADING], ids=MASK_IDS)
@pytest.mark.parametrize(
    "arguments", [{}, {"unroll": True}, {"use_bias": False}, {"go_backwards": True}]
)
def test_sequence_matches_numpy_reference(draw, arguments, mask):
    layer = ScratchLSTM(6, bias_initializer="random_normal", **RETURNS, **arguments)
    x = draw(3, 7, 5)
    outputs = layer(x, mask=mask)
    if layer.go_backwards:
        x, mask = x[:, ::-1], None if mask is None else mask[:, ::-1]
    assert_close(outputs, lstm(x, weights_of(layer.cell), mask=mask))


@pytest.mark.parametrize("sequences", [False, True], ids=["last", "sequences"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize(
    ("time_major", "batch", "time"), [(False, None, None), (True, 3, 7)]
)
def test_symbolic_shapes(sequences, state, time_major, batch, time):
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


def test_signature_is_that_of_the_built_in_layer():
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


def test_activity_regularizer(draw):
    x, losses = draw(3, 7, 5), []
    for make in (ScratchLSTM, layers.LSTM):
        keras.utils.set_random_seed(7)
        layer = make(6, activity_regularizer=keras.regularizers.L2(0.5))
        total = 0.5 * (numpy(layer(x)) ** 2).sum()
        losses.append(numpy(layer.losses[0]))
        # Keras divides by the batch size; its early versions do not.
        assert np.isclose(losses[-1], [total, total / 3], rtol=1e-5).any()
    np.testing.assert_allclose(*losses, rtol=1e-5)


# --- stateful layers ---------------------------------------------------------


def test_stateful_layer_resumes_from_the_last_states(draw):
    layer = ScratchLSTM(6, stateful=True, return_sequences=True)
    x = draw(3, 14, 5)
    parts = [numpy(layer(x[:, :7])), numpy(layer(x[:, 7:]))]
    expected, h, c = lstm(x, weights_of(layer.cell))
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-6)
    assert_close(layer.states, [h, c])
    states = list(layer.states)
    for reset in (layer.reset_state, lambda: layer.build((3, 7, 5))):
        reset()
        assert all(a is b for a, b in zip(states, layer.states, strict=True))
        assert not any(numpy(state).any() for state in states)
        np.testing.assert_allclose(numpy(layer(x[:, :7])), parts[0], atol=1e-6)
    assert ScratchLSTM(6).states is None


@pytest.mark.parametrize(
    ("method", "policy", "tolerance"),
    [
        ("fit", "mixed_bfloat16", 4e-2),
        ("predict", "float32", 1e-5),
    ],
)
def test_states_pass_from_batch_to_batch(draw, method, policy, tolerance):
    layer, x = ScratchLSTM(6, stateful=True, dtype=policy), draw(9, 7, 5)
    model = keras.Sequential([keras.Input(batch_shape=(3, 7, 5)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    arguments = {"batch_size": 3, "verbose": 0}
    if method == "fit":
        arguments |= {"shuffle": False, "y": np.zeros((9, 6), "float32")}
    getattr(model, method)(x, **arguments)
    assert {state.dtype for state in layer.states} == {"float32"}
    # Three batches of three sequences are three sequences of three times the length.
    x = np.concatenate(np.split(x, 3), 1)
    _, *expected = lstm(x, weights_of(layer.cell))
    assert_close(layer.states, expected, tolerance)


def test_states_are_variables_and_not_weights():
    layer = ScratchLSTM(6, stateful=True)
    layer.build((3, 7, 5))
    assert [weight.name for weight in layer.weights] == NAMES
    assert [weight.name for weight in layer.trainable_variables] == NAMES
    for state in layer.states:
        assert state.shape == (3, 6)
        assert any(state is variable for variable in layer.variables)
        assert any(state is variable for variable in layer.non_trainable_variables)


# --- masks -------------------------------------------------------------------


@pytest.mark.usefixtures("masking_of_the_base_class")
def test_mask_reaches_the_loss_and_the_metrics(draw, rng):
    layer = ScratchLSTM(6, return_sequences=True)
    model = keras.Sequential(
        [keras.Input((7,)), layers.Embedding(9, 5, mask_zero=True), layer]
    )
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    tokens = rng.integers(1, 9, size=(3, 7))
    tokens[~GAPS] = 0
    y = draw(3, 7, 6)
    results = model.evaluate(tokens, y, verbose=0, return_dict=True)
    x = numpy(model.layers[0](tokens))
    outputs, _, _ = lstm(x, weights_of(layer.cell), mask=GAPS)
    error = (outputs - y)[GAPS]
    np.testing.assert_allclose(results["mae"], abs(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(results["loss"], (error**2).mean(), rtol=1e-5)


def test_computed_mask():
    x, mask = keras.Input((7, 5)), np.ones((3, 7), bool)
    assert ScratchLSTM(6).compute_mask(x, mask) is None
    assert ScratchLSTM(6, return_sequences=True).compute_mask(x, mask) is mask
    assert ScratchLSTM(6, **RETURNS).compute_mask(x, mask) == [mask, None, None]


# --- time-major --------------------------------------------------------------


def swapped(x):
    return np.ascontiguousarray(np.swapaxes(x, 0, 1))


def test_time_major_in_bidirectional(draw):
    """Right without sequences, and rejected with them, as Keras flips axis 1."""
    time_major = ScratchLSTM(6, time_major=True, go_backwards=True, **RETURNS)
    for given in (
        {"layer": ScratchLSTM(6, time_major=True, **RETURNS)},
        {"layer": ScratchLSTM(6, **RETURNS), "backward_layer": time_major},
    ):
        with pytest.raises(ValueError, match="`time_major` must be False within"):
            layers.Bidirectional(**given)
    layer = ScratchLSTM(6, time_major=True, return_state=True)
    layer = layers.Bidirectional(layer, merge_mode="sum")
    x = draw(3, 7, 5)
    outputs = layer(swapped(x))
    _, h, c = lstm(x, weights_of(layer.forward_layer.cell))
    _, h_back, c_back = lstm(x[:, ::-1], weights_of(layer.backward_layer.cell))
    assert_close(outputs, [h + h_back, h, c, h_back, c_back])


# --- custom cells ------------------------------------------------------------


@pytest.mark.parametrize("zero_output", [False, True], ids=["", "zero_output"])
@pytest.mark.parametrize(
    ("unroll", "time_major", "backwards"),
    [(False, False, False), (False, True, True), (True, True, False)],
    ids=["", "time_major, backwards", "unrolled, time_major"],
)
def test_output_of_a_custom_cell_with_masks(
    draw, unroll, zero_output, time_major, backwards
):
    # In Keras, unrolling backwards with a mask is wrong or fails.
    if unroll and zero_output and BACKEND == "jax":
        pytest.skip("on JAX, Keras ignores `zero_output_for_mask` if unrolled")
    arguments = {"go_backwards": backwards, "unroll": unroll, "time_major": time_major}
    arguments["zero_output_for_mask"] = zero_output
    cell, x, mask = ScaledCell(6), draw(3, 7, 5), LEADING
    swap = swapped if time_major else np.asarray
    results = []
    for returns in (RETURNS, {"return_state": True}):
        layer = ScratchLSTM(cell=cell, **returns, **arguments)
        results.append(layer(swap(x), mask=swap(mask)))
    (outputs, *states), last = results
    if backwards:
        x, mask = x[:, ::-1], mask[:, ::-1]
    h_all, *expected_states = lstm(x, weights_of(cell), mask=mask)
    seen = np.cumsum(mask, 1)[..., None] > 0
    expected = np.where(mask[..., None] if zero_output else seen, 2 * h_all + 1, 0)
    assert_close([swap(numpy(outputs)), *states], [expected, *expected_states])
    assert_close(last, [expected[:, -1], *expected_states])


# --- GPUs --------------------------------------------------------------------


WITH_CUDNN = [
    {},
    {"cell": ScratchLSTMCell(6)},
    {"recurrent_dropout": 0.5},  # in inference
    {"stateful": True, "go_backwards": True},
]
WITHOUT_CUDNN = [
    {"use_cudnn": False},
    {"unroll": True},
    {"use_bias": False},
    {"activation": "relu"},
    {"recurrent_activation": "hard_sigmoid"},
    {"cell": ScaledCell(6)},
]


@pytest.mark.parametrize("arguments", [*WITH_CUDNN, *WITHOUT_CUDNN], ids=label)
def test_supports_jit_on_a_gpu(mocked_gpu, arguments):
    supports_jit = arguments in WITHOUT_CUDNN
    layer = ScratchLSTM(**({} if "cell" in arguments else {"units": 6}) | arguments)
    restored = ScratchLSTM.from_config(layer.get_config())
    assert layer.supports_jit is restored.supports_jit is supports_jit
    model = keras.Sequential([keras.Input(batch_shape=(4, 7, 5)), layer])
    model.compile("sgd", "mse")
    assert model.jit_compile is supports_jit


@pytest.mark.parametrize(
    ("arguments", "uses_cudnn"),
    [
        (
            {"stateful": True, "go_backwards": True, "dropout": 0.3, "seed": 3},
            True,
        ),
        pytest.param({"recurrent_dropout": 0.3, "seed": 3}, True, marks=SLOW),
        pytest.param({"use_cudnn": True}, True, marks=SLOW),
        ({"bidirectional": True, "masked": True}, True),
    ],
    ids=str,
)
@pytest.mark.ci
def test_models_on_a_gpu_give_the_results_of_the_cpu(
    rng, mocked_gpu, monkeypatch, arguments, uses_cudnn
):
    import keras_scratch_lstm.recurrence.tensorflow as backend

    x, y = rng.normal(size=(8, 7, 5)), rng.normal(size=(8, 1))
    arguments = dict(arguments)
    is_bidirectional = arguments.pop("bidirectional", False)
    first = [layers.Masking()] if arguments.pop("masked", False) else []
    x[1:3, 4:] = 0
    results = []
    for on_gpu in (True, False):
        monkeypatch.setattr(backend, "has_gpu", lambda on_gpu=on_gpu: on_gpu)
        if not on_gpu:
            arguments.pop("use_cudnn", None)
        keras.utils.set_random_seed(3)
        layer = ScratchLSTM(6, **arguments)
        layer = layers.Bidirectional(layer) if is_bidirectional else layer
        inputs = keras.Input(batch_shape=(4, 7, 5))
        model = keras.Sequential([inputs, *first, layer])
        # In XLA, equal seeds give other dropout masks.
        jit_compile = "auto" if on_gpu else False
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)
        data = {"batch_size": 4, "verbose": 0}
        history = model.fit(x, y, shuffle=False, **data).history["loss"]
        predictions = model.predict(x, **data)
        results.append([history, predictions, *model.trainable_weights])
        assert bool(mocked_gpu) == uses_cudnn  # the second run adds no calls
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)


@pytest.mark.parametrize(
    "mask", [None, GAPS, PADDED, LEADING, PADDED[:, ::-1]], ids=[*MASK_IDS, "left"]
)
@pytest.mark.parametrize("has_states", [False, True])
def test_masks_on_a_gpu(draw, mocked_gpu, mask, has_states):
    layer, x = ScratchLSTM(6, **RETURNS), draw(3, 7, 5)
    states = [draw(3, 6), draw(3, 6)] if has_states else [np.zeros((3, 6))] * 2
    if mask is not None:
        x[~mask] = np.nan
    outputs, *last = layer(x, mask=mask, initial_state=states if has_states else None)
    assert layer.recurrence == "cudnn"
    assert mocked_gpu or mask is not None  # else one that cuDNN cannot compute
    expected, *expected_last = lstm(
        np.nan_to_num(x), weights_of(layer.cell), *states, mask
    )
    seen = np.ones((3, 7), bool) if mask is None else np.cumsum(mask, 1) > 0
    assert_close(ops.convert_to_numpy(outputs)[seen], expected[seen])
    assert_close(last, expected_last)


# --- errors ------------------------------------------------------------------


CELL = {"cell": ScratchLSTMCell(6)}
ONLY_OUR_CELL = "`cell` must be a `ScratchLSTMCell` or an instance of a subclass. "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": None}, "`units` must be a positive integer. Received: units=None"),
        ({"units": 6, "use_cudnn": "yes"}, "`use_cudnn` must be True, False or 'auto'"),
        ({"cell": ScratchLSTMCell}, ONLY_OUR_CELL),
        ({"cell": layers.LSTMCell(6)}, ONLY_OUR_CELL),
        (CELL | {"units": 6}, "`units` must not be passed together with `cell`"),
        (CELL | {"use_bias": np.zeros(2)}, "`use_bias` must not be passed together"),
        (CELL | {"kernel_initializer": {"f": "zeros"}}, "`kernel_initializer` must no"),
    ],
    ids=label,
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + ".{0,150}$"):
        ScratchLSTM(**arguments)


MASK = "`mask` must have the shape "
STATE = "`initial_state` must have the shape (3, 6). Received: "


@pytest.mark.parametrize(
    ("arguments", "call", "message"),
    [
        ({}, {"shape": (3, 0, 5)}, "`sequences` must have at least one time step"),
        ({}, {"mask": (3,)}, MASK + "(3, 7). Received: (3,)"),
        ({"time_major": True}, {"mask": (3, 7)}, MASK + "(7, 3). Received: (3, 7)"),
        ({}, {"states": [(3, 6)]}, "`initial_state` must be a list of 2 tensors. Rec"),
        ({}, {"states": [(3, 6), (3, 5)]}, STATE + "(3, 5)"),
        ({}, {"states": [(1, 6)] * 2}, STATE + "(1, 6)"),
        ({"stateful": True}, {"shape": (2, 7, 5)}, "`sequences` must have the batch "),
        ({}, {"shape": (3, 7, 4)}, "is incompatible with the layer"),
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
    for state, before in zip(layer.states or [], states, strict=True):
        np.testing.assert_array_equal(numpy(state), before)


@pytest.mark.skipif("cudnn" in recurrence.implementations(), reason="needs no GPU")
@pytest.mark.parametrize("arguments", [{}, {"unroll": True}])
def test_use_cudnn_without_a_gpu(draw, arguments):
    rates = {"dropout": 0.5, "recurrent_dropout": 0.5}
    layer = ScratchLSTM(6, use_cudnn=True, name="one", **rates, **arguments)
    message = "`use_cudnn` must be 'auto' or False where .*`one` with use_cudnn=True"
    with pytest.raises(ValueError, match=message):
        layer(draw(3, 7, 5))
    layer.use_cudnn = "auto"
    assert layer(draw(2, 7, 5), training=True).shape == (2, 6)  # with new masks
