"""The types of the public signatures.

Keras has no types to build on, so a tensor is `Any` to a type checker.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeAlias

Tensor: TypeAlias = Any  # of the backend or symbolic, an array, a variable
Shape: TypeAlias = Sequence[int | None]
Config: TypeAlias = dict[str, Any]
Logs: TypeAlias = dict[str, Any] | None

# By name, as an object or as a class, as in `keras.activations.get`.
Activation: TypeAlias = str | Callable[..., Any] | None
# The same, or serialized, or a dict with a choice for each gate.
Choice: TypeAlias = Activation | Mapping[str, Any]

Path: TypeAlias = str | PathLike[str]
Tokens: TypeAlias = Iterable[object]  # of one sample: a string, or a list of strings
