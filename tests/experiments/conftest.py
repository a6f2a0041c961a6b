import pytest
from models import BATCH, FEATURES, TIME


@pytest.fixture
def x(rng):
    return rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")
