"""Tracing, masks, conversion and saving, also on backends for inference only."""

import importlib.util
import re

import keras
import numpy as np
import pytest
from models import LAYERS, TIME, assert_close, embed, numpy_trace, sequential
from reference import run_python

from keras_scratch_lstm import ScratchLSTM, to_builtin, to_scratch, trace_gates

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("kind", ["LSTM", "ScratchLSTM"])
def test_trace_conversion_and_saving(kind, tokens, tmp_path):
    tokens[1:, 4:] = 0
    model = sequential(LAYERS[kind](name="lstm"), mask_zero=True, time=TIME)
    mask = tokens != 0
    expected = numpy_trace(model.get_layer("lstm"), embed(tokens, model), mask=mask)
    outputs = model.predict(tokens, verbose=0)
    last = np.where(mask, np.arange(TIME), 0).max(1)
    h = expected["h"][np.arange(len(tokens)), last]
    kernel, bias = model.layers[-1].get_weights()
    np.testing.assert_allclose(outputs, h @ kernel + bias, rtol=1e-4, atol=1e-5)
    path = tmp_path / "model.keras"
    model.save(path)
    for one in (path, str(path)):
        assert_close(trace_gates(one, tokens), expected)
    loaded = keras.saving.load_model(path)
    convert = to_scratch if kind == "LSTM" else to_builtin
    converted = convert(model)
    is_scratch = isinstance(converted.get_layer("lstm"), ScratchLSTM)
    assert is_scratch == (kind == "LSTM")
    for other in (model, loaded, converted):
        assert_close(trace_gates(other, tokens), expected)
        found = other.predict(tokens, verbose=0)
        np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("backend", "kind"), [("numpy", "ScratchLSTM"), ("openvino", "LSTM")]
)
def test_backends_for_inference_only(backend, kind):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    test = f"{__file__}::test_trace_conversion_and_saving[{kind}]"
    options = ["-q", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    printed = run_python("-m", "pytest", *options, test, KERAS_BACKEND=backend)
    assert re.search(r"^1 passed in", printed, re.MULTILINE)  # and none skipped
