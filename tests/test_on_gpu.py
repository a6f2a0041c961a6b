"""What only a GPU can check: `pytest -m gpu`, on each backend.

Implementations, dtypes and compilation, against the reference loop and NumPy.
`benchmarks/gpu.py` compares the training of models with the built-in layer.
"""

import contextlib

import keras
import numpy as np
import pytest
from gradients import BACKEND, with_gradients
from keras import layers, ops
from reference import assert_close, lstm, weights_of

from keras_scratch_lstm import ScratchLSTM, recurrence

BATCH, TIME, FEATURES, UNITS = 8, 20, 32, 64
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
steps, lengths = np.arange(TIME), np.array([20, 1, 7, 19, 2, 13, 20, 5])[:, None]
MASKS = {
    "unmasked": None,
    "right": steps < lengths,
    "left": steps >= TIME - lengths,
    "gaps": steps % lengths != 1,
    "nothing": (steps < lengths) & (np.arange(BATCH) != 2)[:, None],  # of one sample
}


def has_gpu():
    if BACKEND == "jax":
        import jax

        return jax.default_backend() == "gpu"
    return "cudnn" in recurrence.implementations()


without_gpu = pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
pytestmark = [pytest.mark.gpu, without_gpu]


def set_tf32(enabled):
    """Whether a GPU rounds the factors of float32 matmuls to 10 bits."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_tensor_float_32_execution(enabled)
    elif BACKEND == "jax":
        import jax

        precision = None if enabled else "float32"
        jax.config.update("jax_default_matmul_precision", precision)
    else:
        import torch

        torch.backends.cudnn.allow_tf32 = enabled


@pytest.fixture(autouse=True)
def full_precision():
    set_tf32(False)
    yield
    set_tf32(True)


def make_layer(seed, **arguments):
    keras.utils.set_random_seed(seed)
    arguments = {"return_sequences": True, "bias_initializer": "normal"} | arguments
    layer = ScratchLSTM(UNITS, **arguments)
    layer.build((BATCH, TIME, FEATURES))
    return layer


def outputs_and_gradients(layer, x, mask, weights, autocast=None):
    def loss(x):
        with autocast or contextlib.nullcontext():
            results = layer(x, mask=mask, training=True)
        results = [ops.cast(result, "float32") for result in results]
        products = map(ops.multiply, weights, results)
        return sum(map(ops.sum, products)), results

    outputs, gradients = with_gradients(loss, layer.trainable_variables)(x)
    return [*outputs, *gradients]


def implementation(mask, dtype="float32", use_bias=True, **_):
    without_cudnn = {
        "tensorflow": not use_bias or dtype == "mixed_bfloat16",
        "jax": True,
        "torch": mask == "gaps",
    }[BACKEND]
    return BACKEND if without_cudnn else "cudnn"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "arguments",
    [
        *({}, {"go_backwards": True}, {"use_bias": False}),
        *({"dtype": "mixed_float16"}, {"dtype": "mixed_bfloat16"}),
        *({"autocast": name} for name in ("float16", "bfloat16") if BACKEND == "torch"),
    ],
    ids=str,
)
def test_outputs_and_gradients_match_the_loop(draw, seed, mask, arguments):
    arguments = {"return_state": True} | arguments
    dtype, autocast = arguments.pop("autocast", None), None
    if dtype:
        import torch

        autocast = torch.autocast("cuda", getattr(torch, dtype))
    loss_weights = draw(BATCH, TIME, UNITS), draw(BATCH, UNITS), draw(BATCH, UNITS)
    inputs = draw(BATCH, TIME, FEATURES), MASKS[mask], loss_weights
    layer = make_layer(seed, **arguments)
    results = outputs_and_gradients(layer, *inputs, autocast)
    assert layer.recurrence == implementation(mask, **arguments)
    dtype = dtype or arguments.pop("dtype", "float32").removeprefix("mixed_")
    with recurrence.force("loop"):
        loop = outputs_and_gradients(make_layer(seed, **arguments), *inputs)
    for one, other in zip(results, loop, strict=True):
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one / scale, other / scale, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("batch", "time"), [(0, TIME), (1, 1), (1, TIME), (BATCH, 1)])
def test_small_shapes_match_numpy(draw, seed, mask, batch, time):
    layer, x = make_layer(seed), draw(batch, time, FEATURES)
    mask = None if MASKS[mask] is None else MASKS[mask][:batch, :time]
    outputs = ops.convert_to_numpy(layer(x, mask=mask))
    assert outputs.shape == (batch, time, UNITS)
    expected = lstm(x, weights_of(layer.cell), mask=mask)[0]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


# `torch.compile` needs a C++ compiler.
@pytest.mark.parametrize("jit_compile", ["auto", False] + [True] * (BACKEND != "torch"))
@pytest.mark.parametrize("kind", ["plain", "stateful", "Bidirectional"])
def test_transposed_inputs_of_models_match_numpy(draw, seed, kind, jit_compile):
    """A compiler may leave their layout as it is, but cuDNN may not read it."""
    use_cudnn = False if jit_compile is True else "auto"  # XLA has no cuDNN
    layer = make_layer(seed, stateful=kind == "stateful", use_cudnn=use_cudnn)
    both = layers.Bidirectional(layer) if kind == "Bidirectional" else layer
    inputs = keras.Input(batch_shape=(BATCH, FEATURES, TIME))
    model = keras.Sequential([inputs, layers.Permute((2, 1)), both])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    x = draw(BATCH, FEATURES, TIME)
    model.fit(x, np.ones(model.output_shape), batch_size=BATCH, verbose=0)
    if kind == "stateful":
        layer.reset_state()
    found, x, w = model.predict(x, verbose=0), x.transpose(0, 2, 1), weights_of
    if kind == "Bidirectional":
        backward = lstm(x[:, ::-1], w(both.backward_layer.cell))[0][:, ::-1]
        assert_close(found[..., UNITS:], backward)
        layer = both.forward_layer
    assert_close(found[..., :UNITS], lstm(x, w(layer.cell))[0])
