"""What an argument may be. A check returns the value, or raises one sentence."""

import numbers
import operator
from pathlib import Path

import keras
import numpy as np

_LONGEST = 300  # letters of what came, in a message


def invalid(argument, value, expected):
    """The error that names an argument, what came, and what is expected."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        came = f"array of shape {tuple(value.shape)} and dtype {dtype_of(value)}"
    else:
        came = repr(value)
    if len(came) > _LONGEST:
        came = came[:_LONGEST] + "…"
    return ValueError(f"`{argument}` must be {expected}. Received: {argument}={came}")


def flag(argument, value, expected="True or False"):
    is_flag = isinstance(value, (bool, np.bool_, int, np.integer)) and value in (0, 1)
    if not is_flag:
        raise invalid(argument, value, expected)
    return bool(value)


def positive_integer(argument, value):
    number = _integer(value)
    if number is None or number <= 0:
        raise invalid(argument, value, "a positive integer")
    return number


def integer_or_none(argument, value, low=-(2**31), high=2**31 - 1):
    """An integer of 32 bits, since JAX has no others unless asked."""
    number = 0 if value is None else _integer(value)
    if number is None or not low <= number <= high:
        raise invalid(argument, value, f"an integer from {low} to {high}, or None")
    return None if value is None else number


def index(argument, value, size):
    number = _integer(value)
    if number is None or not 0 <= number < size:
        raise invalid(argument, value, f"an integer from 0 to {size - 1}")
    return number


def fraction(argument, value):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise invalid(argument, value, "a number from 0 to 1")
    return float(value)


def path(argument, value):
    # `open` takes integers, too, as files that are open already.
    try:
        value = Path(value)
        if "\0" not in str(value):
            return value
    except TypeError:
        pass
    raise invalid(argument, value, "the path of a file")


def interpret(argument, value, get, expected):
    """What `get` of Keras makes of an identifier: something to call, or None."""
    try:
        found = get(value)
    except Exception as error:  # whatever the code of a custom object raises
        raise invalid(argument, value, expected) from error
    if found is not None and not callable(found):
        raise invalid(argument, value, expected)
    return found


def float_dtype(value):
    """A dtype as layers and metrics take it: its name, a policy, or None."""
    try:
        policy = keras.dtype_policies.get(value)
        if "float" in policy.compute_dtype:
            return value
    except Exception as error:  # whatever Keras makes of a damaged configuration
        reason = error
    else:
        reason = None
    raise invalid("dtype", value, "a float dtype or a dtype policy of one") from reason


def numbers_only(argument, value, expected):
    """An array or tensor, or what becomes one, with real numbers in it."""
    try:
        array = value if hasattr(value, "dtype") else np.asarray(value)
    except (RuntimeError, TypeError, ValueError):  # of several lengths, and the like
        array = None
    if not are_numbers(array):
        raise invalid(argument, value, expected)
    return array


def config(value):
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise invalid("config", value, "a dict of arguments, as of `get_config`")
    return value


def is_shape(value, ndim):
    """Whether it is a shape of so many axes, the last of a known size."""
    try:
        sizes = [size if size is None else _integer(size) for size in value]
        known = all(size is None or size >= 0 for size in sizes)
    except TypeError:
        return False
    return known and len(sizes) == ndim and bool(sizes[-1])


def are_numbers(tensor):
    """Whether a tensor or array has numbers in it, real ones, or truth values."""
    kinds = "float", "bfloat", "int", "uint", "bool"
    return hasattr(tensor, "dtype") and dtype_of(tensor).startswith(kinds)


def dtype_of(tensor):
    """The name of a dtype, the same on each backend."""
    try:
        return keras.backend.standardize_dtype(tensor.dtype)
    except (TypeError, ValueError):  # no dtype of Keras
        return str(tensor.dtype)


def _integer(value):
    """As an integer, or `None` for what is none; a truth value is none, either."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
