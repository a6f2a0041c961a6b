"""Open the model files of Keras 2."""

import os
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import keras

from keras_scratch_lstm import _validation
from keras_scratch_lstm.convert.keras2.files import (
    FileError,
    open_file,
    read_config,
    read_weights,
)
from keras_scratch_lstm.convert.keras2.models import Builder
from keras_scratch_lstm.convert.keras2.weights import assign, infer_shape

__all__ = ["load_keras2"]


def load_keras2(
    path: str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Any:
    """Load a model that Keras 2 saved as HDF5.

    The result is a model of Keras 3's own layers and operations, with the predictions
    of the original. It is not compiled. `CuDNNLSTM` and `CuDNNGRU` become `LSTM` and
    `GRU`. No code in the file is run.

    Names with characters that Keras 3 does not accept are changed.
    Keras 2's `hard_sigmoid` differs from that of Keras 3; a model with it can be saved,
    and loaded after `import keras_scratch_lstm`.

    Args:
        path: Path of the file of a whole model (`.h5`, `.hdf5`), or of an
            architecture (`.json`), which needs `weights`.
        custom_objects: Dict of names and custom layers, activations or other
            objects. A `Lambda` layer takes its function from the layer's name or
            from the name of the function. Default: `None`.
        weights: Path of an HDF5 file of the weights, or `None` if they are in `path`.
            Default: `None`.

    Returns:
        A `keras.Sequential` or `keras.Model`.

    Raises:
        ValueError: If the file is damaged or has a part that is not supported; the
            message names the layer.

    Example:

        model = load_keras2("stock_prediction.h5")
        trace = trace_gates(model, x)
        model.save("stock_prediction.keras")
    """
    if not isinstance(custom_objects, (Mapping, type(None))):
        raise _validation.invalid("custom_objects", custom_objects, "a dict or None")
    path = _validation.path("path", path)
    weights = path if weights is None else _validation.path("weights", weights)
    custom_objects = dict(custom_objects or {})
    with (
        _one_error(path, weights),
        keras.saving.custom_object_scope(custom_objects),
        open_file(path) as file,
        open_file(weights) if weights != path else nullcontext(file) as weights_file,
    ):
        spec, stored = read_config(file), read_weights(weights_file)
        builder = Builder(
            custom_objects,
            lambda stack: infer_shape(stack, stored),
            most_weights=weights.stat().st_size,
        )
        model = builder.model(spec)
        assign(model, stored, builder)
    for layer, trainable in builder.trainable.items():
        if not trainable:
            layer.trainable = False
    return model


@contextmanager
def _one_error(path, weights):
    """Name the files in the error, whatever a damaged file causes."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if not isinstance(error, FileError):
            reason = f"its contents are invalid ({type(error).__name__}: {reason})"
        files = f"{str(path)!r}"
        if weights != path:
            files += f" with the weights {str(weights)!r}"
        raise ValueError(f"Cannot load {files}: {reason}") from error
