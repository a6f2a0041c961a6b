import os
import random
from pathlib import Path

# Parallel test processes with several threads each only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest

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
