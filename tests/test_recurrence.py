"""The fast ways against the plain loop of `keras.layers.RNN`."""

import itertools

import keras
import numpy as np
import pytest
from gradients import BACKEND, double_precision, with_gradients
from keras import ops

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence

WAYS = list(recurrence.implementations())
MASKS = {
    "unmasked": None,
    "padded": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "holed": [[0, 0, 1, 0, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]],
}


def layer_with(rng, units=4, features=3, **arguments):
    layer = ScratchLSTM(units, **arguments)
    layer.build((3, None, features))
    values = [rng.normal(0, 0.7, weight.shape) for weight in layer.cell.weights]
    layer.cell.set_weights(values)
    return layer


def all_gradients(layer, mask, rng, steps=5, batch=3, training=True):
    """A loss on all outputs and the last states, by weights, inputs and states."""
    dtype = layer.compute_dtype
    shapes = [(batch, steps, 4), (batch, 4), (batch, 4)]
    y, y_h, y_c = (rng.normal(size=shape) for shape in shapes)

    def loss(x, h, c):
        outputs, *states = layer(x, initial_state=[h, c], mask=mask, training=training)
        total = sum(
            ops.sum(ops.cast(weight, dtype) * ops.sin(value))
            for weight, value in zip((y, y_h, y_c), (outputs, *states), strict=True)
        )
        return total, (outputs, *states)

    return with_gradients(loss, layer.cell.trainable_variables)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("go_backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_are_the_loops(rng, way, mask, go_backwards, use_bias):
    if way == "cudnn" and (mask != "unmasked" or not use_bias):
        pytest.skip("not served in cuDNN")
    arguments = {"go_backwards": go_backwards, "use_bias": use_bias}
    mask = MASKS[mask] and np.array(MASKS[mask], bool)
    with double_precision():
        layer = layer_with(
            rng, dtype="float64", return_sequences=True, return_state=True, **arguments
        )
        inputs = [rng.normal(size=size) for size in [(3, 5, 3), (3, 4), (3, 4)]]
        results = {}
        state = rng.bit_generator.state
        for taken in (way, "loop"):
            rng.bit_generator.state = state
            with recurrence.force(taken):
                results[taken] = all_gradients(layer, mask, rng)(*inputs)
            assert layer.recurrence == taken
    outputs, gradients = results[way]
    assert len(gradients) == (12 if use_bias else 8) + 3
    for one, other in zip(
        [*outputs, *gradients], itertools.chain(*results["loop"]), strict=True
    ):
        assert np.ptp(other) > 0
        # On JAX some of Keras's own operations compute in float32.
        tolerance = 1e-5 if BACKEND == "jax" else 1e-12
        np.testing.assert_allclose(one, other, atol=tolerance)


in_training = pytest.mark.parametrize(
    "training", [True, False], ids=["training", "inference"]
)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@in_training
@pytest.mark.parametrize(
    ("batch", "steps"),
    [(1, 1), (1, 7), (3, 1), (3, 2), (3, 4), (3, 6), (3, 10), (2, 13)],
)
@pytest.mark.parametrize("way", WAYS)
def test_batches_and_sequences_of_any_length(
    rng, way, batch, steps, training, use_bias
):
    """In training, TensorFlow runs five steps at a time, and what is left one by one.

    For one sample, JAX has products of its own.
    """
    mask = rng.random((batch, steps)) < 0.8
    if way == "cudnn":
        mask = None
        if not use_bias:
            pytest.skip("not served in cuDNN")
    with double_precision():
        layer = layer_with(
            rng,
            dtype="float64",
            return_sequences=True,
            return_state=True,
            use_bias=use_bias,
        )
        shapes = [(batch, steps, 3), (batch, 4), (batch, 4)]
        inputs = [rng.normal(size=shape) for shape in shapes]
        results = []
        state = rng.bit_generator.state
        for taken in (way, "loop"):
            rng.bit_generator.state = state
            with recurrence.force(taken):
                gradient = all_gradients(layer, mask, rng, steps, batch, training)
                outputs, gradients = gradient(*inputs)
            assert layer.recurrence == taken
            results.append([*outputs, *gradients])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 if BACKEND == "jax" else 1e-12)


@in_training
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_are_the_loops(rng, way, training):
    """The gradient of the gradient's square, as in a gradient penalty."""
    if way == "cudnn":
        pytest.skip("cuDNN has no second derivative")
    layer = layer_with(rng)
    x = rng.normal(size=(3, 5, 3)).astype("float32")

    def penalty(x):
        return {
            "tensorflow": _tf_penalty,
            "jax": _jax_penalty,
            "torch": _torch_penalty,
        }[BACKEND](lambda x: layer(x, training=training), layer.cell.weights, x)

    results = {}
    for taken in (way, "loop"):
        with recurrence.force(taken):
            results[taken] = penalty(x)
        assert layer.recurrence == taken
    for one, other in zip(results[way], results["loop"], strict=True):
        assert np.ptp(other) > 0
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only there is it a choice")
@in_training
@pytest.mark.parametrize("time", [7, None])
def test_second_derivatives_compiled_by_xla(rng, time, training):
    layer = layer_with(rng)
    x = rng.normal(size=(3, 7, 3)).astype("float32")
    results = []
    for taken, jit_compile in ((WAYS[0], True), ("loop", False)):
        with recurrence.force(taken):
            results.append(
                _tf_penalty(
                    lambda x: layer(x, training=training),
                    layer.cell.weights,
                    x,
                    shape=(None, time, 3),
                    jit_compile=jit_compile,
                )
            )
        assert layer.recurrence == taken
    for one, other in zip(*results, strict=True):
        assert np.ptp(other) > 0
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.skipif(BACKEND != "jax", reason="only there are gradients taken forwards")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", [None, "masked"])
def test_hessians_are_the_loops(rng, mask, batch):
    """Of the gradients taken backwards, those taken forwards."""
    import jax

    layer = layer_with(rng)
    x = rng.normal(size=(batch, 5, 3)).astype("float32")
    mask = mask and rng.random((batch, 5)) < 0.8
    results = {}
    for taken in ("jax", "loop"):
        with recurrence.force(taken):
            results[taken] = jax.hessian(lambda x: ops.sum(layer(x, mask=mask) ** 2))(x)
        assert layer.recurrence == taken
    assert np.ptp(results["loop"]) > 0
    np.testing.assert_allclose(results["jax"], results["loop"], atol=1e-4)


def _tf_penalty(call, weights, x, shape=None, jit_compile=False):
    import tensorflow as tf

    weights = [weight.value for weight in weights]
    signature = [tf.TensorSpec(shape or x.shape)]

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def penalty(x):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(call(x) ** 2)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, weights)

    return [gradient.numpy() for gradient in penalty(tf.constant(x))]


def _jax_penalty(call, weights, x):
    import jax

    def loss(x, values):
        pairs = list(zip(weights, values, strict=True))
        with keras.StatelessScope(pairs):
            return ops.sum(call(x) ** 2)

    def penalty(values):
        return ops.sum(jax.grad(loss)(x, values) ** 2)

    values = [weight.value for weight in weights]
    return [np.asarray(gradient) for gradient in jax.jit(jax.grad(penalty))(values)]


def _torch_penalty(call, weights, x):
    import torch

    x = torch.tensor(x, requires_grad=True)
    weights = [weight.value for weight in weights]
    loss = (call(x) ** 2).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    gradients = torch.autograd.grad((dx**2).sum(), weights)
    return [gradient.numpy() for gradient in gradients]


def trained(way, rng, **compiled):
    """Losses and weights of a stateful model after a few steps."""
    keras.utils.set_random_seed(3)
    layer = ScratchLSTM(4, return_sequences=True, stateful=True)
    model = keras.Sequential(
        [keras.Input(batch_shape=(3, 5, 3)), layer, keras.layers.Dense(2)]
    )
    model.compile(keras.optimizers.SGD(0.5), "mse", **compiled)
    x, y = rng.normal(size=(12, 5, 3)), rng.normal(size=(12, 5, 2))
    with recurrence.force(way):
        history = model.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
    assert layer.recurrence == way
    return [history.history["loss"], *model.get_weights()]


@pytest.mark.parametrize(
    "compiled",
    [
        {"jit_compile": True},
        {"jit_compile": False},
        {"steps_per_execution": 2},
        {"run_eagerly": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_however_the_training_step_is_compiled(rng, way, compiled):
    if BACKEND == "torch" and compiled == {"jit_compile": True}:
        pytest.skip("torch.compile needs a C++ compiler")
    if BACKEND == "torch" and "steps_per_execution" in compiled:
        pytest.skip("Keras has no `steps_per_execution` on torch")
    state = rng.bit_generator.state
    loop = trained("loop", rng)
    rng.bit_generator.state = state
    for one, other in zip(trained(way, rng, **compiled), loop, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="only there does the compiler tell")
@pytest.mark.parametrize("batch", [32, 128])
def test_training_takes_no_more_memory_than_the_built_in(batch):
    """In one compiled step, beside the weights and the data."""
    import jax

    def memory(layer):
        x = np.zeros((batch, 35, 28), "float32")
        layer.build(x.shape)
        trainable, others = (
            [variable.value for variable in variables]
            for variables in (
                layer.trainable_variables,
                layer.non_trainable_variables,
            )
        )

        def loss(trainable, x):
            outputs, _ = layer.stateless_call(trainable, others, x, training=True)
            return ops.sum(outputs**2)

        step = jax.jit(jax.value_and_grad(loss)).lower(trainable, x).compile()
        return step.memory_analysis().temp_size_in_bytes

    ours, built_in = (
        memory(make(256, return_sequences=True))
        for make in (ScratchLSTM, keras.layers.LSTM)
    )
    assert 0 < ours <= built_in, (ours, built_in)


# --- which way is taken ------------------------------------------------------


def test_the_fast_way_is_taken_by_itself(rng):
    layer = ScratchLSTM(4)
    assert layer.recurrence is None
    layer(rng.normal(size=(3, 5, 3)).astype("float32"))
    assert layer.recurrence == WAYS[0]


class Halved(ScratchLSTMCell):
    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(o=0.5 * gates.o)


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (lambda: ScratchLSTM(4, activation="relu"), False),
        (lambda: ScratchLSTM(4, recurrent_activation="hard_sigmoid"), False),
        (lambda: ScratchLSTM(4, recurrent_dropout=0.5), True),
        (lambda: ScratchLSTM(4, unroll=True), False),
        (lambda: ScratchLSTM(cell=Halved(4)), False),
    ],
    ids=["activation", "recurrent_activation", "recurrent_dropout", "unroll", "gates"],
)
def test_what_the_fast_ways_do_not_serve_runs_in_the_loop(rng, make, training):
    layer = make()
    layer(rng.normal(size=(3, 5, 3)).astype("float32"), training=training)
    assert layer.recurrence == "loop"


def test_recurrent_dropout_is_only_slow_where_it_drops(rng):
    layer = ScratchLSTM(4, recurrent_dropout=0.5)
    layer(rng.normal(size=(3, 5, 3)).astype("float32"))
    assert layer.recurrence == WAYS[0]


@pytest.mark.parametrize("mask", MASKS)
def test_both_directions_are_fast(rng, mask):
    """Keras has a `Bidirectional` put out zeros for masked steps."""
    mask = MASKS[mask] and np.array(MASKS[mask], bool)
    both = keras.layers.Bidirectional(ScratchLSTM(4, return_sequences=True))
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    fast = ops.convert_to_numpy(both(x, mask=mask))
    assert both.forward_layer.recurrence == both.backward_layer.recurrence == WAYS[0]
    with recurrence.force("loop"):
        loop = ops.convert_to_numpy(both(x, mask=mask))
    np.testing.assert_allclose(fast, loop, atol=1e-6)
    assert mask is None or not fast[~mask].any()


def test_a_batch_and_a_time_of_unknown_size(rng):
    layer = ScratchLSTM(4, return_sequences=True)
    model = keras.Sequential([keras.Input((None, 3)), layer])
    for shape in [(3, 5, 3), (2, 9, 3), (1, 1, 3)]:
        x = rng.normal(size=shape).astype("float32")
        fast = model.predict(x, verbose=0)
        with recurrence.force("loop"):
            loop = ops.convert_to_numpy(layer(x))
        np.testing.assert_allclose(fast, loop, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_training_on_sequences_of_unknown_length(rng, way):
    if way == "cudnn":
        pytest.skip("no mask is served in cuDNN")
    shapes = [(3, 5, 3), (2, 9, 3), (4, 7, 3), (1, 1, 3)]
    batches = [[rng.normal(size=shape) for _ in "xy"] for shape in shapes]
    batches[1][0][0, 6:] = 0  # masked
    results = []
    for taken in (way, "loop"):
        keras.utils.set_random_seed(3)
        layer = ScratchLSTM(3, return_sequences=True)
        model = keras.Sequential(
            [keras.Input((None, 3)), keras.layers.Masking(), layer]
        )
        model.compile(keras.optimizers.SGD(0.5), "mse")
        with recurrence.force(taken):
            losses = [model.train_on_batch(x, y) for x, y in batches]
        assert layer.recurrence == taken
        results.append([losses, *model.get_weights()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.skipif("cudnn" in WAYS, reason="here is a GPU")
def test_cudnn_demanded_where_there_is_none(rng):
    layer = ScratchLSTM(4, use_cudnn=True)
    with pytest.raises(ValueError, match=r"`use_cudnn` is True, but `scratch_lstm.*'a"):
        layer(rng.normal(size=(3, 5, 3)).astype("float32"))


@pytest.mark.skipif("cudnn" not in WAYS, reason="cuDNN needs a GPU")
def test_cudnn_is_taken_on_a_gpu(rng):
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    layer = layer_with(rng, use_cudnn=True)
    fast = ops.convert_to_numpy(layer(x))
    assert layer.recurrence == "cudnn"
    with recurrence.force("loop"):
        layer.use_cudnn = False
        np.testing.assert_allclose(fast, ops.convert_to_numpy(layer(x)), atol=1e-4)
