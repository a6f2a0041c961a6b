import os
import random
from pathlib import Path

# Parallel test processes with several threads each only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA's optimizations take longer than the tests that run what it compiles.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpy as np
import pytest

collect_ignore = ["compat/make_addons.py", "convert/make_keras2.py"]  # scripts
BOOK = Path(__file__).parents[2] / "shared" / "data" / "timemachine.txt"


def pytest_collection_modifyitems(items):
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        return
    skip = pytest.mark.skip(reason=f"the same on tensorflow, so not on {backend}")
    for item in items:
        if item.get_closest_marker("one_backend"):
            item.add_marker(skip)


@pytest.fixture
def seed():
    """A new seed for each test, printed, or that of `TEST_SEED`."""
    value = int(os.environ.get("TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def draw(rng):
    """Draws float32 arrays of a shape."""
    return lambda *shape: rng.normal(size=shape).astype("float32")


@pytest.fixture
def x(draw):
    """The inputs of the layers of `models.py`."""
    from models import BATCH, FEATURES, TIME

    return draw(BATCH, TIME, FEATURES)


@pytest.fixture
def book():
    """The path of the book's text."""
    if not BOOK.exists():
        pytest.skip(f"the book's text is not at {BOOK}")
    return BOOK


@pytest.fixture
def dtype_policy():
    """Sets Keras's dtype policy for one test."""
    import keras

    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.fixture(params=["RNN masks", "RNN does not mask"])
def masking_of_the_base_class(request, monkeypatch):
    """As of Keras 3.16, `RNN.__init__` sets `supports_masking` to False."""
    from keras import layers

    init = layers.RNN.__init__

    def initialize(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.supports_masking = request.param == "RNN masks"

    monkeypatch.setattr(layers.RNN, "__init__", initialize)


@pytest.fixture
def mocked_gpu(monkeypatch):
    """Shapes of the inputs of cuDNN, on a host that seems to have a GPU."""
    import keras

    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow compiles cuDNN ops by XLA")
    import tensorflow as tf

    from keras_scratch_lstm.recurrence import tensorflow as backend

    calls, devices = [], tf.config.list_physical_devices

    def cudnn(input, input_h, input_c, params, sequence_lengths, rnn_mode, time_major):
        x, h, c = input, input_h[:, 0], input_c[:, 0]
        assert (rnn_mode, time_major) == ("lstm", False)
        tf.debugging.assert_equal(sequence_lengths, tf.shape(input)[1])
        calls.append(x.shape)
        # Like those of cuDNN, this op has no XLA kernel.
        x = tf.ensure_shape(tf.py_function(lambda x: x, [x], x.dtype), x.shape)
        rows, columns = 4 * h.shape[-1], (x.shape[-1], h.shape[-1])
        sizes = [rows * columns[0], rows * columns[1], rows, rows]
        *matrices, bias, second_bias = tf.split(params, sizes)
        kernel, recurrent_kernel = (
            tf.transpose(tf.reshape(matrix, (rows, -1))) for matrix in matrices
        )
        bias += second_bias
        h_all = tf.TensorArray(x.dtype, x.shape[1])
        for t in range(x.shape[1]):
            z = x[:, t] @ kernel + h @ recurrent_kernel + bias
            i, f, c_tilde, o = tf.split(z, 4, -1)
            c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(c_tilde)
            h = tf.sigmoid(o) * tf.tanh(c)
            h_all = h_all.write(t, h)
        h_all = tf.transpose(h_all.stack(), (1, 0, 2))
        h_all = tf.reshape(h_all, (-1, x.shape[1], h.shape[-1]))
        return h_all, h[:, None], c[:, None], None, None

    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    # Keras compiles by XLA only where there is a GPU.
    monkeypatch.setattr(
        tf.config,
        "list_physical_devices",
        lambda *kind: devices(*kind) + ([] if kind else [gpu]),
    )
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    monkeypatch.setattr(tf.raw_ops, "CudnnRNNV3", cudnn)
    return calls
