import numpy as np
import pytest
from models import BATCH, TIME, UNITS

from keras_scratch_lstm import GateTrace
from keras_scratch_lstm.tracing.trace import ARRAYS


@pytest.fixture
def tokens(rng):
    return rng.integers(1, 9, (BATCH, TIME))


@pytest.fixture
def states(rng):
    return [np.float32(rng.normal(size=(BATCH, UNITS))) for _ in range(4)]


@pytest.fixture
def trace(rng):
    arrays = {name: rng.random((2, 3, 4)).astype("float32") for name in ARRAYS}
    return GateTrace(**arrays, layer="lstm")
