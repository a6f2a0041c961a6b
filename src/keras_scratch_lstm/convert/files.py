"""Load models from paths."""

import os
from typing import Any

import keras

from keras_scratch_lstm import _validation
from keras_scratch_lstm.convert import keras2
from keras_scratch_lstm.convert.keras2.files import is_of_keras3


def load_model(path: str | os.PathLike[str]) -> Any:
    """Load the model in a file of Keras 2 or Keras 3, as the content of the file is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be loaded.
    """
    if "://" in str(path):  # such as `hf://`, which Keras downloads
        return keras.saving.load_model(path, compile=False)
    path = _validation.path("model", path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            "`model` must be a model, or the path of a model's file. There is no file "
            f"{str(path)!r}."
        )
    with keras2.one_error(path):
        is_of_keras2 = not is_of_keras3(path)
    if is_of_keras2:
        return keras2.load_keras2(path)
    try:
        return keras.saving.load_model(path, compile=False)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise ValueError(
            f"Cannot load {str(path)!r}: {reason} Archives must be named `.keras`, and "
            "HDF5 files `.h5`. For custom objects, call `keras.saving.load_model` with "
            "`custom_objects`, and pass the model."
        ) from error
