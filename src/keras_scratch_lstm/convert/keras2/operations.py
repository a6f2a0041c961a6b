"""The TensorFlow functions in Functional models, as operations of Keras 3."""

import functools

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm.convert.keras2.files import FileError

CLASSES = ("TFOpLambda", "SlicingOpLambda")
_SLICE = ("start", "stop", "step")
_OPERANDS = ("y", "b")  # the arguments that may be tensors
_OF_LISTS = (ops.concatenate, ops.stack)


def _getitem(x, slice_spec=None):
    keys = slice_spec if isinstance(slice_spec, tuple) else (slice_spec,)
    keys, axis, flipped = [_key(key) for key in keys], 0, []
    for k, key in enumerate(keys):
        if key is Ellipsis:
            axis = len(x.shape) - sum(later is not None for later in keys[k:])
        elif isinstance(key, slice) and (key.step or 1) < 0:  # which PyTorch rejects
            ends = (end if end is None else ~end for end in (key.start, key.stop))
            keys[k] = slice(*ends, -key.step)
            flipped.append(axis)
        axis += key is not None
    return ops.get_item(_flip(x, flipped), tuple(keys))


def _flip(x, axis):
    # Keras 3.12 flips one axis at a time.
    return functools.reduce(ops.flip, axis, x)


def _key(value):
    """The index, slice, `None` or `...` that a value of JSON describes."""
    if value == {"class_name": "__ellipsis__"}:
        return Ellipsis
    is_slice = isinstance(value, dict) and value.keys() == set(_SLICE)
    parts = [value[k] for k in _SLICE] if is_slice else [value]
    if any(type(part) not in (int, type(None)) for part in parts) or parts[2:] == [0]:
        raise FileError(f"the index {value!r:.80} is not supported.")
    return slice(*parts) if is_slice else value


def _mean(x, **options):
    """In TensorFlow, the mean of integers is one, too."""
    mean = ops.mean(x, **options)
    return ops.cast(mean, x.dtype) if "int" in x.dtype else mean


def _matmul(x, b, transpose_a=False, transpose_b=False):
    x = ops.swapaxes(x, -1, -2) if transpose_a else x
    return ops.matmul(x, ops.swapaxes(b, -1, -2) if transpose_b else b)


def _squeeze(x, axis=None):
    if axis is None:  # not the batch, even if its size is 1
        axis = tuple(k for k, size in enumerate(x.shape) if size == 1)
    return x if axis == () else ops.squeeze(x, axis)


def _same(prefix, names, arguments):
    """Functions that Keras names as TensorFlow does."""
    return {f"{prefix}{k}": (getattr(ops, k), arguments) for k in names.split()}


_Y, _AXIS = {"y": "x2"}, {"axis": "axis"}
_REDUCTION = {"axis": "axis", "keepdims": "keepdims"}
# Each function of TensorFlow: that of Keras, and what it calls the other arguments.
OPERATIONS = {
    "__operators__.getitem": (_getitem, {"slice_spec": "slice_spec"}),
    "__operators__.add": (ops.add, _Y),
    **_same("math.", "add subtract multiply maximum minimum equal not_equal", _Y),
    **_same("math.", "greater greater_equal less less_equal", _Y),
    "math.truediv": (ops.divide, _Y),
    "math.pow": (ops.power, _Y),
    "linalg.matmul": (_matmul, {k: k for k in ("b", "transpose_a", "transpose_b")}),
    **_same("math.", "abs exp log negative sigmoid sign softplus sqrt square tanh", {}),
    **_same("nn.", "relu elu silu", {}),
    "nn.softmax": (ops.softmax, _AXIS),
    "math.reduce_sum": (ops.sum, _REDUCTION),
    "math.reduce_mean": (_mean, _REDUCTION),
    "math.reduce_max": (ops.max, _REDUCTION),
    "math.reduce_min": (ops.min, _REDUCTION),
    "cast": (ops.cast, {"dtype": "dtype"}),
    "clip_by_value": (ops.clip, {"clip_value_min": "x_min", "clip_value_max": "x_max"}),
    "concat": (ops.concatenate, _AXIS),
    "stack": (ops.stack, _AXIS),
    "unstack": (ops.unstack, {"num": "num", "axis": "axis"}),
    "expand_dims": (ops.expand_dims, _AXIS),
    "squeeze": (_squeeze, _AXIS),
    "reshape": (ops.reshape, {"shape": "newshape"}),
    "transpose": (ops.transpose, {"perm": "axes"}),
    "tile": (ops.tile, {"multiples": "repeats"}),
    "reverse": (_flip, _AXIS),
    "one_hot": (ops.one_hot, {"depth": "num_classes"}),
}


def operation(class_name, config):
    """The operation of a layer, to be called with the arguments in its nodes."""
    name, function = config.get("name"), str(config.get("function"))
    # The functions of TensorFlow 1 have the same arguments, and some more.
    found = OPERATIONS.get(function.removeprefix("compat.v1."))
    if found is None:
        rule = f"layer {name!r} ({class_name}): the function is not supported"
        remedy = f"Use only {', '.join(OPERATIONS)}"
        raise FileError(f"{rule}. {remedy}. Received: {function!r:.80}")
    return functools.partial(_call, *found)


def _call(function, names, x, name=None, **arguments):
    first = _first_tensor([x, *(arguments.get(key) for key in _OPERANDS)])
    if first is None:
        raise FileError("it has no inputs.")

    def convert(value):
        """TensorFlow converts arrays to the dtype of the tensor."""
        is_array = isinstance(value, (list, np.ndarray))
        return np.asarray(value, first.dtype) if is_array else value

    x = [x] if function in _OF_LISTS and not isinstance(x, list) else x
    given = {}
    for key, value in arguments.items():
        if key in names and key in _OPERANDS:
            given[names[key]] = convert(value)
        elif key in names and _first_tensor(value) is None:
            given[names[key]] = tuple(value) if isinstance(value, list) else value
        elif value is not False:
            raise FileError(f"`{key}` is not supported. Received: {key}={value!r:.80}")
    return function(keras.tree.map_structure(convert, x), **given)


def _first_tensor(value):
    return next(filter(keras.utils.is_keras_tensor, keras.tree.flatten(value)), None)
