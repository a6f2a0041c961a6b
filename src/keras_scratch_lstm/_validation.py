"""Checks of arguments that Keras does not make itself.

Each check returns the value, or raises a `ValueError` that states the rule.
"""

import math
import numbers
import operator
from collections.abc import Iterable
from pathlib import Path

import keras
import numpy as np

_MAX_LENGTH = 300  # characters of a received value in a message


def invalid(argument, value, rule):
    """The error for an argument that must be something else."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        received = f"array of shape {tuple(value.shape)} and dtype {dtype_of(value)}"
    else:
        received = repr(value)
    if len(received) > _MAX_LENGTH:
        received = received[:_MAX_LENGTH] + "…"
    return ValueError(f"`{argument}` must be {rule}. Received: {argument}={received}")


def positive_integer(argument, value):
    number = _integer(value)
    if number is None or number <= 0:
        raise invalid(argument, value, "a positive integer")
    return number


def integer(argument, value, low, high):
    number = _integer(value)
    if number is None or not low <= number <= high:
        raise invalid(argument, value, f"an integer from {low} to {high}")
    return number


def positive_number(argument, value):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise invalid(argument, value, "a positive number")
    return float(value)


def fraction(argument, value):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise invalid(argument, value, "a number from 0 to 1")
    return float(value)


def select(argument, selection, size):
    """Return the indices that a selection has on an axis.

    Raises:
        ValueError: If it selects nothing, or an index that is out of range.
    """
    try:
        is_iterable = isinstance(selection, Iterable)
        key = list(selection) if is_iterable else selection
        indices = np.atleast_1d(np.arange(size)[slice(None) if key is None else key])
    except (IndexError, TypeError):
        indices = np.zeros(0)
    if indices.ndim != 1 or not indices.size:
        rule = f"an integer, a slice or a list of integers that selects some of {size}"
        raise invalid(argument, selection, rule)
    return indices


def path(argument, value):
    # `open` also takes integers, as file descriptors.
    try:
        value = Path(value)
        if "\0" not in str(value):
            return value
    except TypeError:
        pass
    raise invalid(argument, value, "the path of a file")


def to_numpy(value, dtype=None):
    """A NumPy array of what `np.asarray` takes, or of a tensor on any device."""
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    return np.asarray(value, dtype)


def are_numbers(tensor):
    """Whether a tensor or array holds real numbers or booleans."""
    kinds = "float", "bfloat", "int", "uint", "bool"
    return hasattr(tensor, "dtype") and dtype_of(tensor).startswith(kinds)


def dtype_of(tensor):
    """The name of a dtype, which is the same on all backends."""
    try:
        return keras.backend.standardize_dtype(tensor.dtype)
    except (TypeError, ValueError):  # not a dtype of Keras
        return str(tensor.dtype)


def _integer(value):
    """The value as an integer, or `None` if it is not one. A Boolean is not."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
