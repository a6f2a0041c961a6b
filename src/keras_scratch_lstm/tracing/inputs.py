"""Read the inputs of a trace: arrays, nested lists and datasets of batches."""

import itertools

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation

_RULE = "arrays with at least one sample, a nested list, or a dataset of batches"


def read_batches(inputs, batches=1, argument="inputs", stateful=False):
    """Yield the first `batches` of a dataset, without targets, or else `inputs` itself.

    A ragged tensor is yielded row by row, so that no padding is needed; a stateful
    model, whose rows have different states, rejects it.
    """
    if batches is not None:
        batches = _validation.positive_integer("batches", batches)
    found = [inputs]
    if _is_dataset(inputs):
        found = (
            keras.utils.unpack_x_y_sample_weight(batch)[0]
            for batch in itertools.islice(inputs, batches)
        )
    empty = True
    for batch in found:
        ragged = [x for x in keras.tree.flatten(batch) if _is_ragged(x)]
        if ragged and stateful:
            rule = "padded, with a mask, for a model with stateful layers"
            raise _validation.invalid(argument, batch, rule)
        if not ragged:
            empty = False
            yield batch
            continue
        for k in range(int(ragged[0].shape[0])):
            empty = False
            yield keras.tree.map_structure(lambda x, k=k: _row(x, k), batch)
    if empty:
        raise _validation.invalid(argument, inputs, _RULE)


def check_inputs(inputs, argument="inputs", time_major=False):
    """Return one batch with nested lists as arrays, and its number of samples."""
    received = inputs
    try:
        inputs = _to_arrays(inputs)
    except ValueError:  # from NumPy
        raise ValueError(
            f"`{argument}` must be {_RULE}. Received a nested list with rows of "
            "different lengths. Pad it with `keras.utils.pad_sequences`."
        ) from None
    arrays = keras.tree.flatten(inputs)
    axis = int(time_major)
    sizes = {x.shape[axis] if len(x.shape) > axis else 0 for x in arrays}
    if len(sizes) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in arrays[:4])
        raise ValueError(
            f"`{argument}` must be arrays with the same number of samples. Received "
            f"shapes: {shapes}"
        )
    if not sizes or 0 in sizes or not all(map(_is_valid, arrays)):
        if len(arrays) == 1 and arrays[0].shape:
            received = arrays[0]
        raise _validation.invalid(argument, received, _RULE)
    return inputs, sizes.pop()


def _is_dataset(inputs):
    is_array = hasattr(inputs, "shape") or isinstance(inputs, (str, bytes))
    return (
        not is_array
        and not isinstance(inputs, (list, tuple, dict))
        and (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__"))
    )


def _row(x, k):
    x = x[k : k + 1]
    return x.to_tensor() if _is_ragged(x) else x


def _is_ragged(x):
    return hasattr(x, "row_splits")  # a `tf.RaggedTensor`


def _to_arrays(inputs):
    if isinstance(inputs, dict):
        return {key: _to_arrays(value) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)) and any(
        hasattr(x, "shape") for x in keras.tree.flatten(inputs)
    ):
        return [_to_arrays(value) for value in inputs]
    is_tensor = ops.is_tensor(inputs) or isinstance(inputs, keras.Variable)
    return inputs if is_tensor else np.asarray(inputs)


def _is_valid(array):
    """Whether it has numbers, booleans or strings. pandas stores strings as objects."""
    if str(array.dtype) != "object":
        return True
    return all(isinstance(value, (str, bytes)) for value in np.ravel(array))
