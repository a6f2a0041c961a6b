"""The fast implementations against the reference loop of `keras.layers.RNN`."""

import itertools

import keras
import numpy as np
import pytest
from gradients import BACKEND, double_precision, with_gradients
from keras import ops
from reference import fuse

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence

FAST = list(recurrence.implementations())
MASKS = {
    "unmasked": None,
    "padded": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "gaps": [[0, 0, 1, 0, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]],
}


def layer_with(rng, units=4, features=3, **arguments):
    layer = ScratchLSTM(units, **arguments)
    layer.build((3, None, features))
    values = [rng.normal(0, 0.7, weight.shape) for weight in layer.cell.weights]
    layer.cell.set_weights(values)
    return layer


def all_gradients(layer, mask, rng, time=5, batch=3, training=True):
    """The gradients of a loss on all outputs by the weights, inputs and states."""
    dtype = layer.compute_dtype
    shapes = [(batch, time, 4), (batch, 4), (batch, 4)]
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
@pytest.mark.parametrize("fast", FAST)
def test_outputs_and_gradients_match_the_loop(rng, fast, mask, go_backwards, use_bias):
    if fast == "cudnn" and (mask != "unmasked" or not use_bias):
        pytest.skip("not supported by cuDNN")
    arguments = {"go_backwards": go_backwards, "use_bias": use_bias}
    mask = MASKS[mask] and np.array(MASKS[mask], bool)
    with double_precision():
        layer = layer_with(
            rng, dtype="float64", return_sequences=True, return_state=True, **arguments
        )
        inputs = [rng.normal(size=size) for size in [(3, 5, 3), (3, 4), (3, 4)]]
        results = {}
        state = rng.bit_generator.state
        for used in (fast, "loop"):
            rng.bit_generator.state = state
            with recurrence.force(used):
                results[used] = all_gradients(layer, mask, rng)(*inputs)
            assert layer.recurrence == used
    outputs, gradients = results[fast]
    assert len(gradients) == (12 if use_bias else 8) + 3
    for one, other in zip(
        [*outputs, *gradients], itertools.chain(*results["loop"]), strict=True
    ):
        assert np.ptp(other) > 0
        # On JAX, some of Keras's ops compute in float32.
        tolerance = 1e-5 if BACKEND == "jax" else 1e-12
        np.testing.assert_allclose(one, other, atol=tolerance)


in_training = pytest.mark.parametrize(
    "training", [True, False], ids=["training", "inference"]
)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
@in_training
@pytest.mark.parametrize(
    ("batch", "time"),
    [(1, 1), (1, 7), (3, 1), (3, 2), (3, 4), (3, 6), (3, 10), (2, 13)],
)
@pytest.mark.parametrize("fast", FAST)
def test_batches_and_sequences_of_many_sizes(
    rng, fast, batch, time, training, use_bias
):
    """Around the unroll factor of TensorFlow, and the single sample of JAX."""
    mask = rng.random((batch, time)) < 0.8
    if fast == "cudnn":
        mask = None
        if not use_bias:
            pytest.skip("not supported by cuDNN")
    with double_precision():
        layer = layer_with(
            rng,
            dtype="float64",
            return_sequences=True,
            return_state=True,
            use_bias=use_bias,
        )
        shapes = [(batch, time, 3), (batch, 4), (batch, 4)]
        inputs = [rng.normal(size=shape) for shape in shapes]
        results = []
        state = rng.bit_generator.state
        for used in (fast, "loop"):
            rng.bit_generator.state = state
            with recurrence.force(used):
                gradient = all_gradients(layer, mask, rng, time, batch, training)
                outputs, gradients = gradient(*inputs)
            assert layer.recurrence == used
            results.append([*outputs, *gradients])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 if BACKEND == "jax" else 1e-12)


@in_training
@pytest.mark.parametrize("fast", FAST)
def test_second_derivatives_match_the_loop(rng, fast, training):
    """As in a gradient penalty: the gradient of the squared gradient."""
    if fast == "cudnn":
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
    for used in (fast, "loop"):
        with recurrence.force(used):
            results[used] = penalty(x)
        assert layer.recurrence == used
    for one, other in zip(results[fast], results["loop"], strict=True):
        assert np.ptp(other) > 0
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow: XLA is optional")
@in_training
@pytest.mark.parametrize("time", [7, None])
@pytest.mark.slow
def test_second_derivatives_compiled_by_xla(rng, time, training):
    layer = layer_with(rng)
    x = rng.normal(size=(3, 7, 3)).astype("float32")
    results = []
    for used, jit_compile in ((FAST[0], True), ("loop", False)):
        with recurrence.force(used):
            results.append(
                _tf_penalty(
                    lambda x: layer(x, training=training),
                    layer.cell.weights,
                    x,
                    shape=(None, time, 3),
                    jit_compile=jit_compile,
                )
            )
        assert layer.recurrence == used
    for one, other in zip(*results, strict=True):
        assert np.ptp(other) > 0
        np.testing.assert_allclose(one, other, atol=1e-4)


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


# --- transformations ---------------------------------------------------------

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="transformations of JAX")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="transformations of torch")
with_and_without_mask = pytest.mark.parametrize("mask", MASKS)


def with_built_in(rng, **arguments):
    """Our layer and the built-in one, with the same random weights."""
    layer = layer_with(rng, **arguments)
    built_in = keras.layers.LSTM(4, **arguments)
    built_in.build((3, None, 3))
    built_in.set_weights(fuse(layer.get_weights()))
    return layer, built_in


def assert_trees_close(ours, theirs, atol=1e-5):
    ours, theirs = (
        [ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(tree)]
        for tree in (ours, theirs)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert np.ptp(other.astype("float64")) > 0
        np.testing.assert_allclose(one, other, atol=atol)


@on_jax
@pytest.mark.parametrize("mask", ["unmasked", "gaps"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("transformation", ["jvp", "jacfwd", "jacrev", "hessian"])
def test_jax_derivatives_match_the_built_in_layer(rng, transformation, batch, mask):
    import jax

    x, dx = rng.normal(size=(2, batch, 5, 3)).astype("float32")
    mask = MASKS[mask] and np.array(MASKS[mask], bool)[:batch]
    results = []
    for layer in with_built_in(rng, return_sequences=True):
        transform = {
            "jvp": lambda call: jax.jvp(call, (x,), (dx,)),
            "jacfwd": lambda call: jax.jacfwd(call)(x),
            "jacrev": lambda call: jax.jit(jax.jacrev(call))(x),
            "hessian": lambda call: jax.hessian(lambda x: ops.sum(call(x) ** 2))(x),
        }[transformation]
        results.append(transform(lambda x, layer=layer: layer(x, mask=mask)))
    assert_trees_close(*results, atol=1e-4 if transformation == "hessian" else 1e-5)


@on_jax
@pytest.mark.parametrize("mask", ["unmasked", "gaps"])
@pytest.mark.parametrize("transformation", ["linearize", "jit jvp", "jvp jit"])
def test_forced_loop_supports_all_jax_transformations(rng, transformation, mask):
    import jax

    x, dx = rng.normal(size=(2, 3, 5, 3)).astype("float32")
    mask = MASKS[mask] and np.array(MASKS[mask], bool)
    results = []
    for layer in with_built_in(rng):
        transform = {
            "linearize": lambda call: jax.linearize(call, x)[1](dx),
            "jit jvp": lambda call: jax.jit(lambda x: jax.jvp(call, (x,), (dx,)))(x),
            "jvp jit": lambda call: jax.jvp(jax.jit(call), (x,), (dx,)),
        }[transformation]
        with recurrence.force("loop"):
            results.append(transform(lambda x, layer=layer: layer(x, mask=mask)))
    assert_trees_close(*results)


@on_jax
@with_and_without_mask
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_strict_dtype_promotion_on_jax(rng, policy, batch, mask):
    import jax

    layer = layer_with(rng, dtype=policy, return_sequences=True, return_state=True)
    mask = MASKS[mask] and np.array(MASKS[mask], bool)[:batch]
    inputs = [rng.normal(size=size) for size in [(batch, 5, 3), (batch, 4), (batch, 4)]]
    inputs = [value.astype("float32") for value in inputs]
    results = []
    state = rng.bit_generator.state
    for promotion in ("strict", "standard"):
        rng.bit_generator.state = state
        with jax.numpy_dtype_promotion(promotion):
            results.append(all_gradients(layer, mask, rng, batch=batch)(*inputs))
        assert layer.recurrence == "jax"
    assert_trees_close(*results, atol=1e-6)


@on_torch
@with_and_without_mask
@pytest.mark.parametrize("map_over", ["torch.func.vmap", "vectorized_map"])
@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no_bias"])
def test_vmap_matches_the_batch(rng, map_over, mask, use_bias):
    import torch

    layer = layer_with(rng, return_sequences=True, use_bias=use_bias)
    x = torch.tensor(rng.normal(size=(3, 5, 3)).astype("float32"))
    mask = torch.tensor(np.array(MASKS[mask] or np.ones((3, 5)), bool))
    masked = not bool(mask.all())

    def call(inputs):
        x, mask = inputs
        return layer(x[None], mask=mask[None] if masked else None)[0]

    if map_over == "vectorized_map":
        outputs = ops.vectorized_map(call, (x, mask))
    else:
        outputs = torch.func.vmap(lambda x, mask: call((x, mask)))(x, mask)
    assert_trees_close(outputs, layer(x, mask=mask if masked else None), atol=1e-6)


@on_torch
@with_and_without_mask
@pytest.mark.filterwarnings("ignore:.*There is a performance drop:UserWarning")
def test_per_sample_gradients_match_single_samples(rng, mask):
    """By the weights and the inputs, as in differentially private training."""
    import torch

    layer = layer_with(rng)
    x = torch.tensor(rng.normal(size=(3, 5, 3)).astype("float32"))
    mask = torch.tensor(np.array(MASKS[mask] or np.ones((3, 5)), bool))
    masked = not bool(mask.all())
    values = [weight.value.detach() for weight in layer.weights]

    def loss(values, x, mask):
        pairs = list(zip(layer.weights, values, strict=True))
        with keras.StatelessScope(pairs):
            return (layer(x[None], mask=mask[None] if masked else None) ** 2).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    gradients = torch.func.vmap(gradient, in_dims=(None, 0, 0))(values, x, mask)
    for k in range(3):
        with recurrence.force("loop"):
            x_k = x[k].clone().requires_grad_()
            weights = [value.clone().requires_grad_() for value in values]
            expected = torch.autograd.grad(
                loss(weights, x_k, mask[k]), [*weights, x_k], materialize_grads=True
            )
        ours = [gradient[k] for gradient in keras.tree.flatten(gradients)]
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@on_torch
@with_and_without_mask
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_autocast_on_a_cpu(rng, dtype, atol, mask):
    """Outputs and gradients within the precision of the dtype."""
    import torch

    layer = layer_with(rng, return_sequences=True)
    x = torch.tensor(rng.normal(size=(3, 5, 3)).astype("float32"))
    mask = MASKS[mask] and np.array(MASKS[mask], bool)
    weights = [weight.value for weight in layer.weights]
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", getattr(torch, dtype), enabled=enabled):
            outputs = layer(x, mask=mask)
            loss = outputs.float().sin().sum()
        gradients = torch.autograd.grad(loss, weights)
        results.append([outputs.float(), *(g.float() / 10 for g in gradients)])
        assert layer.recurrence == "torch"
    assert_trees_close(*results, atol=atol)


def trained(fast, rng, **compiled):
    """Losses and weights of a stateful model after training."""
    keras.utils.set_random_seed(3)
    layer = ScratchLSTM(4, return_sequences=True, stateful=True)
    model = keras.Sequential(
        [keras.Input(batch_shape=(3, 5, 3)), layer, keras.layers.Dense(2)]
    )
    model.compile(keras.optimizers.SGD(0.5), "mse", **compiled)
    x, y = rng.normal(size=(12, 5, 3)), rng.normal(size=(12, 5, 2))
    with recurrence.force(fast):
        history = model.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
    assert layer.recurrence == fast
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
@pytest.mark.parametrize("fast", FAST)
def test_compiled_training_matches_the_loop(rng, fast, compiled):
    if BACKEND == "torch" and compiled == {"jit_compile": True}:
        pytest.skip("torch.compile needs a C++ compiler")
    if BACKEND == "torch" and "steps_per_execution" in compiled:
        pytest.skip("Keras has no `steps_per_execution` on torch")
    state = rng.bit_generator.state
    loop = trained("loop", rng)
    rng.bit_generator.state = state
    for one, other in zip(trained(fast, rng, **compiled), loop, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX reports the memory")
@pytest.mark.parametrize("batch", [32, 128])
def test_training_takes_no_more_memory_than_the_built_in(batch):
    """In one compiled training step, without the weights and the data."""
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


# --- the choice of an implementation -----------------------------------------


def test_fast_implementation_is_the_default(rng):
    layer = ScratchLSTM(4)
    assert layer.recurrence is None
    layer(rng.normal(size=(3, 5, 3)).astype("float32"))
    assert layer.recurrence == FAST[0]


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
def test_unsupported_layers_run_the_loop(rng, make, training):
    layer = make()
    layer(rng.normal(size=(3, 5, 3)).astype("float32"), training=training)
    assert layer.recurrence == "loop"


def test_recurrent_dropout_is_fast_in_inference(rng):
    layer = ScratchLSTM(4, recurrent_dropout=0.5)
    layer(rng.normal(size=(3, 5, 3)).astype("float32"))
    assert layer.recurrence == FAST[0]


@pytest.mark.parametrize("mask", MASKS)
def test_bidirectional_is_fast(rng, mask):
    """`Bidirectional` returns zeros for masked time time."""
    mask = MASKS[mask] and np.array(MASKS[mask], bool)
    both = keras.layers.Bidirectional(ScratchLSTM(4, return_sequences=True))
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    fast = ops.convert_to_numpy(both(x, mask=mask))
    assert both.forward_layer.recurrence == both.backward_layer.recurrence == FAST[0]
    with recurrence.force("loop"):
        loop = ops.convert_to_numpy(both(x, mask=mask))
    np.testing.assert_allclose(fast, loop, atol=1e-6)
    assert mask is None or not fast[~mask].any()


def test_unknown_batch_size_and_time(rng):
    layer = ScratchLSTM(4, return_sequences=True)
    model = keras.Sequential([keras.Input((None, 3)), layer])
    for shape in [(3, 5, 3), (2, 9, 3), (1, 1, 3)]:
        x = rng.normal(size=shape).astype("float32")
        fast = model.predict(x, verbose=0)
        with recurrence.force("loop"):
            loop = ops.convert_to_numpy(layer(x))
        np.testing.assert_allclose(fast, loop, atol=1e-6)


@pytest.mark.parametrize("fast", FAST)
def test_training_with_unknown_time_matches_the_loop(rng, fast):
    if fast == "cudnn":
        pytest.skip("cuDNN does not support masks")
    shapes = [(3, 5, 3), (2, 9, 3), (4, 7, 3), (1, 1, 3)]
    batches = [[rng.normal(size=shape) for _ in "xy"] for shape in shapes]
    batches[1][0][0, 6:] = 0  # masked
    results = []
    for used in (fast, "loop"):
        keras.utils.set_random_seed(3)
        layer = ScratchLSTM(3, return_sequences=True)
        model = keras.Sequential(
            [keras.Input((None, 3)), keras.layers.Masking(), layer]
        )
        model.compile(keras.optimizers.SGD(0.5), "mse")
        with recurrence.force(used):
            losses = [model.train_on_batch(x, y) for x, y in batches]
        assert layer.recurrence == used
        results.append([losses, *model.get_weights()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.skipif("cudnn" not in FAST, reason="cuDNN needs a GPU")
def test_cudnn_on_a_gpu(rng):
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    layer = layer_with(rng, use_cudnn=True)
    fast = ops.convert_to_numpy(layer(x))
    assert layer.recurrence == "cudnn"
    with recurrence.force("loop"):
        layer.use_cudnn = False
        np.testing.assert_allclose(fast, ops.convert_to_numpy(layer(x)), atol=1e-4)
