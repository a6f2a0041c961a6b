"""Types of the public signatures.

Keras is untyped, so a tensor is `Any` to a type checker.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

Tensor: TypeAlias = Any  # tensor of the backend, symbolic tensor, array or variable
Model: TypeAlias = Any  # model of Keras
Layer: TypeAlias = Any  # layer of Keras, or its name
Data: TypeAlias = Any  # array or tensor, a nested structure of these, or a dataset
Shape: TypeAlias = Sequence[int | None]
Config: TypeAlias = dict[str, Any]
Logs: TypeAlias = dict[str, Any] | None

# Anything that `keras.activations.get` takes.
Activation: TypeAlias = str | Callable[..., Any] | None
# The same, or a serialized object, or a dict with one of these per gate.
Choice: TypeAlias = Activation | Mapping[str, Any]

Path: TypeAlias = str | PathLike[str]
Tokens: TypeAlias = Iterable[object]  # of one sample: a string, or a list of strings
Selection: TypeAlias = int | slice | Iterable[int] | None  # of an axis; `None` is all
