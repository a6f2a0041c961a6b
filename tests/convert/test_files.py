"""Paths in place of models: files of Keras 2 and of Keras 3."""

import keras
import numpy as np
import pytest
from keras import layers
from keras2_files import HARD, SHAPES, write_keras_2_1

from keras_scratch_lstm import trace_gates


@pytest.mark.parametrize("name", ["old.h5", "old.keras", "old"])
def test_path_to_a_keras2_file(tmp_path, rng, draw, name):
    path, x = tmp_path / name, draw(2, 5, 3)
    kernel, recurrent_kernel, bias, _, _ = write_keras_2_1(path, rng, HARD)
    trace = trace_gates(str(path), x)
    h_prev = np.pad(trace.h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    z = x @ kernel + h_prev @ recurrent_kernel + bias
    np.testing.assert_allclose(
        trace.i, np.clip(0.2 * z + 0.5, 0, 1)[..., :4], atol=1e-5
    )


@pytest.mark.parametrize("name", ["new.keras", "new.h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_path_to_a_keras3_file(tmp_path, draw, name):
    lstm, x = layers.LSTM(2), draw(2, 5, 3)
    model = keras.Sequential([keras.Input((5, 3)), lstm])
    keras.saving.save_model(model, tmp_path / name)
    expected = trace_gates(model, x)
    np.testing.assert_array_equal(trace_gates(tmp_path / name, x).f, expected.f)


class Custom(layers.Layer):
    def call(self, inputs):
        return inputs


@pytest.mark.one_backend
def test_errors_name_the_remedy(tmp_path, rng, draw):
    x = draw(2, 5, 3)
    with pytest.raises(FileNotFoundError, match=r"^`model` must .*none.h5"):
        trace_gates(tmp_path / "none.h5", x)
    model = keras.Sequential([keras.Input((5, 3)), Custom(), layers.LSTM(2)])
    model.save(tmp_path / "custom.keras")
    with pytest.raises(ValueError, match=r"Cannot load .* with `custom_objects`"):
        trace_gates(tmp_path / "custom.keras", x)
    (tmp_path / "custom.keras").rename(tmp_path / "custom.zip")
    with pytest.raises(ValueError, match=r"Archives must be named `.keras`"):
        trace_gates(tmp_path / "custom.zip", x)
    (tmp_path / "page.h5").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"^Cannot load .*page.h5': it is a web page"):
        trace_gates(tmp_path / "page.h5", x)
    unknown = {**HARD, "config": [*HARD["config"], {"class_name": "A", "config": {}}]}
    write_keras_2_1(tmp_path / "old.h5", rng, unknown, SHAPES)
    with pytest.raises(ValueError, match=r"layer 'A' .*`custom_objects=\{'A': ...\}`"):
        trace_gates(tmp_path / "old.h5", x)
