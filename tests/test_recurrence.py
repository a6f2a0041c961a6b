"""The fast implementations against the reference loop of `keras.layers.RNN`."""

import keras
import numpy as np
import pytest
from custom_cells import CoupledCell
from gradients import BACKEND, double_precision, with_gradients
from keras import ops
from reference import assert_close, fuse

from keras_scratch_lstm import ScratchLSTM, recurrence

FAST = list(recurrence.implementations())
MASKS = {
    "unmasked": None,
    "padded": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "gaps": [[0, 0, 1, 0, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]],
}
MASKS = {name: mask and np.array(mask, bool) for name, mask in MASKS.items()}
RETURNS = {"return_sequences": True, "return_state": True}
each_fast = pytest.mark.parametrize(
    "fast", [pytest.param(x, marks=[pytest.mark.gpu] * (x == "cudnn")) for x in FAST]
)
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def layer_with(rng, units=4, features=3, **arguments):
    layer = ScratchLSTM(units, **arguments)
    layer.build((3, None, features))
    values = [rng.normal(0, 0.7, weight.shape) for weight in layer.cell.weights]
    layer.cell.set_weights(values)
    return layer


def all_gradients(layer, mask, rng, shape=(3, 5, 3), training=True):
    """Outputs, and gradients of a loss on them by the weights, inputs and states."""
    batch, time, _ = shape
    dtype, state = layer.compute_dtype, (batch, 4)
    y, y_h, y_c = (rng.normal(size=size) for size in [(batch, time, 4), state, state])

    def loss(x, h, c):
        outputs, *states = layer(x, initial_state=[h, c], mask=mask, training=training)
        total = sum(
            ops.sum(ops.cast(weight, dtype) * ops.sin(value))
            for weight, value in zip((y, y_h, y_c), (outputs, *states), strict=True)
        )
        return total, (outputs, *states)

    inputs = [rng.normal(size=size).astype(dtype) for size in (shape, state, state)]
    outputs, gradients = with_gradients(loss, layer.cell.trainable_variables)(*inputs)
    assert len(gradients) == len(layer.cell.weights) + 3
    return [*outputs, *gradients]


def compare_with_the_loop(rng, fast, mask, shape=(3, 5, 3), training=True, **arguments):
    """In float64, if the backend can."""
    if fast == "cudnn":
        skip_unless_cudnn_supports(mask, **arguments)
    with double_precision():
        layer = layer_with(rng, dtype="float64", **RETURNS, **arguments)
        results, state = [], rng.bit_generator.state
        for used in (fast, "loop"):
            rng.bit_generator.state = state
            with recurrence.force(used):
                results.append(all_gradients(layer, mask, rng, shape, training))
            assert layer.recurrence == used
    for one, other in zip(*results, strict=True):
        # On JAX, some of Keras's ops compute in float32.
        tolerance = 1e-5 if BACKEND == "jax" else 1e-12
        np.testing.assert_allclose(one, other, atol=tolerance)
    return results[1]


def skip_unless_cudnn_supports(mask, use_bias=True, go_backwards=False):
    if BACKEND == "tensorflow" and not use_bias:
        pytest.skip("Keras's binding of cuDNN needs a bias")
    starts_masked = mask is not None and not mask[:, -1 if go_backwards else 0].all()
    if BACKEND == "torch" and (starts_masked or mask is MASKS["gaps"]):
        pytest.skip("cuDNN supports padding only")


@pytest.mark.parametrize(
    "arguments", [{}, {"go_backwards": True, "use_bias": False}], ids=str
)
@each_mask
@each_fast
def test_outputs_and_gradients_match_the_loop(rng, fast, mask, arguments):
    for values in compare_with_the_loop(rng, fast, mask, **arguments):
        assert np.ptp(values) > 0


# An empty batch, the single sample of JAX, and around the unroll factor of TensorFlow.
SIZES = [(0, 4), (1, 1), (1, 7), (3, 1), (3, 6)]
SIZES += [] if BACKEND == "jax" else [(3, 2), (3, 4), (3, 10), (2, 13)]


@pytest.mark.parametrize(("batch", "time"), SIZES)
@each_fast
def test_batches_and_sequences_of_many_sizes(rng, fast, batch, time):
    mask = None if fast == "cudnn" else rng.random((batch, time)) < 0.8
    training = (batch, time) != (3, 6)  # one size in inference
    compare_with_the_loop(rng, fast, mask, (batch, time, 3), training)


@pytest.mark.parametrize("go_backwards", [False, True])
@each_fast
def test_padding_on_both_sides_matches_the_loop(rng, fast, go_backwards):
    """Samples with much padding, without any, and with nothing else."""
    x = rng.normal(size=(4, 200, 3))
    mask = np.zeros((4, 200), bool)
    for sample, steps in enumerate([slice(90, 99), slice(5, 200), slice(0, 200)]):
        mask[sample, steps] = True
    x[~mask] = np.nan
    results = []
    with double_precision():
        layer = layer_with(rng, go_backwards=go_backwards, dtype="float64", **RETURNS)
        for used in (fast, "loop"):
            with recurrence.force(used):
                results.append(layer(x, mask=mask))
            assert layer.recurrence == used
    for one, other in zip(*results, strict=True):
        assert_close(one, other, atol=1e-6 if BACKEND == "jax" else 1e-12)


IN_XLA = pytest.param(True, {"jit_compile": True}, marks=pytest.mark.slow)


@each_fast
@pytest.mark.parametrize(("training", "compiled"), [(True, {}), IN_XLA], ids=str)
def test_second_derivatives_match_the_loop(rng, fast, training, compiled):
    """As in a gradient penalty: the gradient of the squared gradient."""
    if fast == "cudnn":
        pytest.skip("cuDNN has no second derivative")
    if compiled and BACKEND != "tensorflow":
        pytest.skip("TensorFlow: XLA is optional")
    penalty = {"tensorflow": _tf_penalty, "jax": _jax_penalty, "torch": _torch_penalty}
    layer, results = layer_with(rng), []
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    for used, arguments in ((fast, compiled), ("loop", {})):
        with recurrence.force(used):
            results.append(penalty[BACKEND](layer, training, x, **arguments))
        assert layer.recurrence == used
    assert_close(*results, atol=1e-4)


def _tf_penalty(layer, training, x, jit_compile=False):
    import tensorflow as tf

    weights = [weight.value for weight in layer.weights]

    def penalty(x):
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x, training=training) ** 2)
            penalty = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(penalty, weights)

    if jit_compile:  # else eagerly
        signature = [tf.TensorSpec((None, None, 3))]
        penalty = tf.function(penalty, input_signature=signature, jit_compile=True)
    return penalty(tf.constant(x))


def _jax_penalty(layer, training, x):
    import jax

    def loss(x, values):
        pairs = list(zip(layer.weights, values, strict=True))
        with keras.StatelessScope(pairs):
            return ops.sum(layer(x, training=training) ** 2)

    def penalty(values):
        return ops.sum(jax.grad(loss)(x, values) ** 2)

    return jax.jit(jax.grad(penalty))([weight.value for weight in layer.weights])


def _torch_penalty(layer, training, x):
    import torch

    x = ops.convert_to_tensor(x).requires_grad_()
    loss = (layer(x, training=training) ** 2).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    weights = [weight.value for weight in layer.weights]
    return torch.autograd.grad((dx**2).sum(), weights)


# --- transformations ---------------------------------------------------------

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="transformations of JAX")
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="transformations of torch")


def with_built_in(rng, **arguments):
    """Our layer and the built-in one, with the same random weights."""
    layer = layer_with(rng, **arguments)
    built_in = keras.layers.LSTM(4, use_cudnn=False, **arguments)
    built_in.build((3, None, 3))
    built_in.set_weights(fuse(layer.get_weights()))
    return layer, built_in


@on_jax
@pytest.mark.parametrize(
    ("transformation", "implementation", "batch", "mask"),
    [
        ("hessian", None, 3, "gaps"),
        ("jacfwd", None, 3, "gaps"),
        ("jvp", None, 1, "unmasked"),
        ("jacrev", None, 1, "unmasked"),
        *((name, "loop", 3, "gaps") for name in ("linearize", "jvp jit")),
    ],
)
def test_jax_derivatives_match_the_built_in_layer(
    rng, transformation, implementation, batch, mask
):
    import jax

    x, dx = rng.normal(size=(2, batch, 5, 3)).astype("float32")
    mask = None if mask == "unmasked" else MASKS[mask][:batch]
    transform = {
        "jvp": lambda call: jax.jvp(call, (x,), (dx,)),
        "jacfwd": lambda call: jax.jacfwd(call)(x),
        "jacrev": lambda call: jax.jit(jax.jacrev(call))(x),
        "hessian": lambda call: jax.hessian(lambda x: ops.sum(call(x) ** 2))(x),
        "linearize": lambda call: jax.linearize(call, x)[1](dx),
        "jvp jit": lambda call: jax.jvp(jax.jit(call), (x,), (dx,)),
    }[transformation]
    with recurrence.force(implementation):
        results = [
            transform(lambda x, layer=layer: layer(x, mask=mask))
            for layer in with_built_in(rng, return_sequences=True)
        ]
    assert_close(*results, atol=1e-4 if transformation == "hessian" else 1e-5)


@on_jax
@pytest.mark.parametrize(
    ("policy", "batch", "mask"),
    [("float32", 3, MASKS["gaps"]), ("mixed_bfloat16", 1, None)],
    ids=["float32", "mixed_bfloat16"],
)
def test_strict_dtype_promotion_on_jax(rng, policy, batch, mask):
    import jax

    layer = layer_with(rng, dtype=policy, **RETURNS)
    results, state = [], rng.bit_generator.state
    for promotion in ("strict", "standard"):
        rng.bit_generator.state = state
        with jax.numpy_dtype_promotion(promotion):
            results.append(all_gradients(layer, mask, rng, (batch, 5, 3)))
        assert layer.recurrence == "jax"
    assert_close(*results, atol=1e-6)


@on_torch
@each_mask
@pytest.mark.filterwarnings("ignore:.*There is a performance drop:UserWarning")
def test_per_sample_gradients_match_single_samples(rng, mask):
    """By the weights and the inputs, as in differentially private training."""
    import torch

    layer = layer_with(rng)
    inputs = [rng.normal(size=(3, 5, 3)).astype("float32"), mask]
    inputs = [ops.convert_to_tensor(one) for one in inputs if one is not None]
    values = [weight.value.detach() for weight in layer.weights]

    def loss(values, x, mask=None):
        mask = None if mask is None else mask[None]
        with keras.StatelessScope(list(zip(layer.weights, values, strict=True))):
            return (layer(x[None], mask=mask) ** 2).sum()

    forward = torch.func.vmap(lambda *one: loss(values, *one))(*inputs)
    gradient = torch.func.grad(loss, argnums=(0, 1))
    axes = (None, *[0] * len(inputs))
    gradients = torch.func.vmap(gradient, in_dims=axes)(values, *inputs)
    for k in range(3):
        x, *mask_k = (value[k].clone() for value in inputs)
        by = [value.clone().requires_grad_() for value in (*values, x)]
        with recurrence.force("loop"):
            single = loss(by[:-1], by[-1], *mask_k)
            np.testing.assert_allclose(forward[k].detach(), single.detach(), 1e-5)
            expected = torch.autograd.grad(single, by, materialize_grads=True)
        ours = [gradient[k] for gradient in keras.tree.flatten(gradients)]
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@on_torch
@pytest.mark.skipif("cudnn" in FAST, reason="runs on the GPU of this host")
@each_mask
@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_autocast_on_a_cpu(rng, dtype, atol, mask):
    """Outputs and gradients within the precision of the dtype."""
    import torch

    layer = layer_with(rng, return_sequences=True)
    x = torch.tensor(rng.normal(size=(3, 5, 3)).astype("float32"))
    weights = [weight.value for weight in layer.weights]
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", getattr(torch, dtype), enabled=enabled):
            outputs = layer(x, mask=mask)
            loss = outputs.float().sin().sum()
        gradients = torch.autograd.grad(loss, weights)
        results.append([outputs.float(), *(g.float() / 10 for g in gradients)])
        assert layer.recurrence == "torch"
    assert_close(*results, atol=atol)


@on_torch
@pytest.mark.parametrize("use_bias", [True, False])
def test_weights_for_cudnn_are_in_one_buffer(rng, use_bias):
    import torch

    from keras_scratch_lstm.recurrence.torch import pack

    layer = layer_with(rng, dtype="float64", use_bias=use_bias)
    kernels = [torch.tensor(one.T) for one in fuse(layer.get_weights())]
    expected = kernels if use_bias else [*kernels, torch.zeros(16).double()]
    expected.append(torch.zeros(16).double())  # the second bias of cuDNN
    by_gate = [weight.value for weight in layer.cell.weights]
    weights = [by_gate[k :: 2 + use_bias] for k in range(2 + use_bias)]

    def packed(*weights):
        weights = [weights[k : k + 4] for k in range(0, len(weights), 4)]
        return pack(*weights, *([] if use_bias else [None]))

    flat = keras.tree.flatten(weights)
    results, start = packed(*flat), 0
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.data_ptr() - results[0].data_ptr() == 8 * start
        assert one.is_contiguous()
        start += one.numel()
    gradients = torch.autograd.grad(sum((one**2).sum() for one in results[:3]), flat)
    assert all(gradient.is_contiguous() for gradient in gradients)  # so not copied
    assert torch.autograd.gradcheck(packed, flat)
    assert torch.autograd.gradgradcheck(packed, flat)
    assert packed(*(one.to("meta") for one in flat))[0].shape == (16, 3)
    with pytest.raises(NotImplementedError):  # so the layer runs its loop
        torch.func.vmap(packed)(*(one.detach()[None] for one in flat))


def trained(fast, rng, **compiled):
    """Losses and weights of a stateful model after training on masked inputs."""
    keras.utils.set_random_seed(3)
    use_cudnn = "auto" if fast == "cudnn" else False
    layer = ScratchLSTM(4, return_sequences=True, stateful=True, use_cudnn=use_cudnn)
    inputs, masking = keras.Input(batch_shape=(3, None, 3)), keras.layers.Masking()
    model = keras.Sequential([inputs, masking, layer, keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.5), "mse", **compiled)
    x, y = rng.normal(size=(12, 5, 3)), rng.normal(size=(12, 5, 2))
    x[1:4, 2:4] = 0
    with recurrence.force(fast):
        history = model.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
    assert layer.recurrence == fast
    return [history.history["loss"], *model.get_weights()]


@each_fast
@pytest.mark.ci
def test_compiled_training_matches_the_loop(rng, fast):
    ways = [{"run_eagerly": True}]
    if BACKEND != "torch":  # where Keras has no such steps, and compiles by C++
        ways.append({"steps_per_execution": 2})
        # XLA cannot compile cuDNN's op.
        ways += [] if fast == "cudnn" else [{"jit_compile": True}]
    if BACKEND != "jax":  # where this is `run_eagerly`
        ways.append({"jit_compile": False})
    state = rng.bit_generator.state
    loop = trained("loop", rng)
    for way in ways:
        rng.bit_generator.state = state
        for one, other in zip(trained(fast, rng, **way), loop, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=str(way))


@on_torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("stateful", "training"), [(False, True), (True, True), (True, False)]
)
def test_torch_compile_of_a_model(rng, stateful, training):
    """A whole graph, but for the states of a stateful layer in training."""
    import torch

    torch.compiler.reset()
    layer = ScratchLSTM(4, return_sequences=True, stateful=stateful)
    inputs, masked = keras.Input(batch_shape=(3, 3, 3)), [keras.layers.Masking()]
    model = keras.Sequential([inputs, *([] if stateful else masked), layer])
    x = rng.normal(size=(3, 3, 3))
    if not stateful:
        x[0, 1] = x[1, 0] = 0
    x = torch.tensor(x, dtype=torch.float32)
    weights = [weight.value for weight in model.trainable_weights]

    def run(call):
        if stateful:
            layer.reset_state()
        calls = [call(x) for _ in range(2)]  # the second continues a stateful layer
        loss = sum((outputs**2).sum() for outputs in calls)
        gradients = torch.autograd.grad(loss, weights) if loss.requires_grad else ()
        return [tensor.detach() for tensor in (*calls, *gradients)]

    is_whole = not (stateful and training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=is_whole)
    with torch.set_grad_enabled(training):
        for one, other in zip(run(compiled), run(model), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@on_jax  # which reports the memory
def test_training_takes_no_more_memory_than_the_built_in():
    """In one compiled training step, without the weights and the data."""
    import jax

    def memory(layer):
        x = np.zeros((32, 35, 28), "float32")
        layer.build(x.shape)
        trainable = [variable.value for variable in layer.trainable_variables]
        others = [variable.value for variable in layer.non_trainable_variables]

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


@pytest.mark.parametrize(
    ("make", "training", "is_fast"),
    [
        (lambda: ScratchLSTM(4), True, True),
        (lambda: ScratchLSTM(4, activation="relu"), False, False),
        (lambda: ScratchLSTM(4, recurrent_dropout=0.5), True, False),
        (lambda: ScratchLSTM(4, recurrent_dropout=0.5), False, True),
        (lambda: ScratchLSTM(cell=CoupledCell(4)), False, False),
    ],
)
def test_choice_of_the_implementation(rng, make, training, is_fast):
    layer = make()
    assert layer.recurrence is None
    layer(rng.normal(size=(3, 5, 3)).astype("float32"), training=training)
    assert layer.recurrence == (FAST[0] if is_fast else "loop")


def test_bidirectional_is_fast(rng):
    both = keras.layers.Bidirectional(ScratchLSTM(4))
    both(rng.normal(size=(3, 5, 3)).astype("float32"), mask=MASKS["padded"])
    assert both.forward_layer.recurrence == both.backward_layer.recurrence == FAST[0]
