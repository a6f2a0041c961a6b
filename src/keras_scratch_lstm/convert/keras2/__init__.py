"""Open the model files of Keras 2."""

import os
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import keras

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm._types import Model
from keras_scratch_lstm.convert import hard_sigmoid
from keras_scratch_lstm.convert.keras2.files import (
    FileError,
    open_file,
    read_config,
    read_weights,
)
from keras_scratch_lstm.convert.keras2.models import Builder
from keras_scratch_lstm.convert.keras2.weights import assign, infer_shape

__all__ = ["load_keras2", "load_keras2_weights"]


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
    return build(path, custom_objects, weights)[0]


def build(path, custom_objects=None, weights=None, **options):
    """Load a model; return it and its `Builder`, which takes the options."""
    if not isinstance(custom_objects, (Mapping, type(None))):
        raise _validation.invalid("custom_objects", custom_objects, "a dict or None")
    path = _validation.path("path", path)
    weights = path if weights is None else _validation.path("weights", weights)
    custom_objects, size = dict(custom_objects or {}), weights.stat().st_size
    with (
        one_error(path, weights),
        keras.saving.custom_object_scope(custom_objects),
        open_file(path) as file,
        open_file(weights) if weights != path else nullcontext(file) as weights_file,
    ):
        spec, stored = read_config(file), read_weights(weights_file, size)
        builder = Builder(
            custom_objects,
            lambda stack: infer_shape(stack, stored),
            file.vocabularies,
            **options,
        )
        with _keras.deferred_variables() as deferred:
            model = builder.model(spec)
        assign(model, stored, builder)
        builder.finish(deferred, size)
    return model, builder


def load_keras2_weights(model: Model, path: str | os.PathLike[str]) -> None:
    """Load the weights of a Keras 2 file into a model that was built in Keras 3.

    The layers must be those of the file in the same order, or have the same names. If
    one has the activation `"hard_sigmoid"`, which in Keras 2 has another slope, the
    weights that it is applied to are multiplied by 1.2, with a warning. The model then
    predicts what Keras 2 predicted.

    Args:
        model: A built `keras.Sequential` or Functional model.
        path: Path of an HDF5 file of weights or of a model, or of a `.keras` archive.

    Raises:
        ValueError: If the weights of a layer do not have the shapes of those in the
            file; the message names the layer. The model is not changed then.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise _validation.invalid("model", model, "a Keras model that is built")
    path = _validation.path("path", path)
    builder = Builder({}, None)
    parts = [part for part in _keras.all_layers(model) if hasattr(part, "layers")]
    builder.parts = {part: part.layers for part in parts}
    with one_error(path), open_file(path) as file:
        assign(model, read_weights(file, path.stat().st_size), builder)
    for name, layer in hard_sigmoid.layers_with(model).items():
        rule = "`hard_sigmoid(x)` of Keras 2 is `hard_sigmoid(1.2 * x)` of Keras 3"
        effect = (
            "weights were multiplied by 1.2"
            if hard_sigmoid.factors(layer)
            else "it differs"
        )
        warnings.warn(f"Layer {name!r}: {effect}, since {rule}.", stacklevel=2)


@contextmanager
def one_error(path, weights=None):
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
        if weights not in (None, path):
            files += f" with the weights {str(weights)!r}"
        raise ValueError(f"Cannot load {files}: {reason}") from error
