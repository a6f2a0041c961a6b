"""Read inputs and targets: arrays, nested lists and datasets of batches."""

import functools
import itertools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation

_RULE = (
    "arrays with at least one sample and at least one time step, a nested list, or a "
    "dataset of batches"
)


class Batch(NamedTuple):
    """Samples to run at a time.

    Attributes:
        inputs: Nested arrays or tensors.
        targets: The targets of the samples, or `None`.
        samples: Integer, the number of samples.
        padding: Integer, how many more there are to fill a fixed batch size.
        is_fixed: Boolean, whether the model takes no other number of samples.
    """

    inputs: Any
    targets: Any
    samples: int
    padding: int = 0
    is_fixed: bool = False

    def crop(self, x):
        """Remove the padding from a result of the model, or of a layer of it.

        A model that folds an axis into the batch has several rows per sample.
        """
        if not self.padding:
            return x
        return x[: x.shape[0] * self.samples // (self.samples + self.padding)]


def read(model, inputs, targets=None, *, batch_size, batches=None):
    """Yield a `Batch` for at most `batch_size` samples at a time.

    Args:
        model: The model that runs the samples.
        inputs: See `trace_gates`.
        targets: Arrays, or `None`: those of the dataset, if there are any.
        batch_size: Positive integer.
        batches: Positive integer, how many batches of a dataset to read, or `None`.
    """
    batch_size = _validation.positive_integer("batch_size", batch_size)
    layers = _keras.all_layers(model)
    stateful = any(getattr(layer, "stateful", False) for layer in layers)
    # Their samples may be on either axis of the inputs.
    is_time_major = any(getattr(layer, "time_major", False) for layer in layers)
    axis = int(getattr(model, "time_major", False))
    for x, y in read_batches(inputs, targets, batches=batches, stateful=stateful):
        x, samples = check_inputs(x, axis=axis)
        if is_time_major:
            yield Batch(x, y, samples, is_fixed=True)
            continue
        fixed = _fixed_batch_size(model, layers, samples)
        for start in range(0, samples, fixed or batch_size):
            count = min(fixed or batch_size, samples - start)
            parts = [x] if y is None else [x, y]
            if count < samples:
                take = functools.partial(_rows, start=start, size=count)
                parts = keras.tree.map_structure(take, parts)
            padding = fixed - count if fixed else 0
            if padding:
                pad = functools.partial(_pad, size=padding)
                parts[0] = keras.tree.map_structure(pad, parts[0])
            yield Batch(*[*parts, None][:2], count, padding, fixed is not None)


def read_batches(inputs, targets=None, batches=1, argument="inputs", stateful=False):
    """Yield the first `batches` of a dataset, or else `inputs` itself, with targets.

    A ragged tensor is yielded row by row, so that no padding is needed; a stateful
    model, whose rows have different states, rejects it.
    """
    if batches is not None:
        batches = _validation.positive_integer("batches", batches)
    found = [(inputs, targets)]
    if _is_dataset(inputs):
        if targets is not None:
            rule = "None for a dataset, which has its own"
            raise _validation.invalid("targets", targets, rule)
        found = (
            keras.utils.unpack_x_y_sample_weight(batch)[:2]
            for batch in itertools.islice(inputs, batches)
        )
    empty = True
    for batch, y in found:
        ragged = [x for x in keras.tree.flatten(batch) if _is_ragged(x)]
        if ragged and stateful:
            rule = "padded, with a mask, for a model with stateful layers"
            raise _validation.invalid(argument, batch, rule)
        if not ragged:
            empty = False
            yield batch, y
            continue
        for k in range(int(ragged[0].shape[0])):
            empty = False
            row = functools.partial(_row, k=k)
            one = None if y is None else keras.tree.map_structure(row, y)
            yield keras.tree.map_structure(row, batch), one
    if empty:
        raise _validation.invalid(argument, inputs, _RULE)


def check_inputs(inputs, argument="inputs", axis=0):
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


def _fixed_batch_size(model, layers, samples):
    shapes = [x.shape for x in getattr(model, "inputs", None) or []]
    fixed = shapes[0][0] if shapes else None
    for layer in layers:
        if getattr(layer, "stateful", False) and getattr(layer, "states", None):
            fixed = keras.tree.flatten(layer.states)[0].shape[0]
            if samples > fixed:
                raise ValueError(
                    f"`inputs` must have at most {fixed} samples, the batch size of "
                    f"the stateful layer {layer.name!r}. Received: {samples} samples"
                )
    return fixed


def _rows(x, start, size):
    return x[start : start + size]


def _pad(x, size):
    """Repeat the last sample."""
    return ops.concatenate([ops.convert_to_tensor(x)] + [x[-1:]] * size)


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
    if 0 in tuple(array.shape):
        return False
    if str(array.dtype) != "object":
        return True
    return all(isinstance(value, (str, bytes)) for value in np.ravel(array))
