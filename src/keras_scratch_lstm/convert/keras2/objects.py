"""The functions and small objects in the configurations of Keras 2 layers."""

from collections.abc import Mapping
from types import FunctionType

import keras

from keras_scratch_lstm.convert.keras2.files import FileError

# `tf.nn.softmax` as an activation; `swish` before Keras named it `silu`.
_RENAMED_ACTIVATIONS = {"softmax_v2": "softmax", "swish": "silu"}
_BASES = {
    "initializer": (keras.initializers, keras.initializers.Initializer),
    "regularizer": (keras.regularizers, keras.regularizers.Regularizer),
    "constraint": (keras.constraints, keras.constraints.Constraint),
}


def find_custom(name, custom_objects):
    """A class or function that the user passed or registered under a name."""
    return keras.saving.get_registered_object(name, custom_objects=custom_objects)


def activation(value, custom_objects, hard_sigmoid):
    """The function of a name. No other modules are searched for it."""
    if isinstance(value, Mapping) and value.get("class_name") == "function":
        value = value.get("config")
    if not isinstance(value, str):
        raise FileError(f"the activation {value!r:.80} is not supported.")
    if found := find_custom(value, custom_objects):
        return found
    if value == "hard_sigmoid":
        return hard_sigmoid
    found = vars(keras.activations).get(_RENAMED_ACTIVATIONS.get(value, value))
    if isinstance(found, FunctionType) and found.__name__ not in _GETTERS:
        return found
    remedy = f"Pass `custom_objects={{{value!r}: ...}}`."
    raise FileError(f"the activation {value!r:.80} is not a Keras activation. {remedy}")


_GETTERS = ("get", "serialize", "deserialize")


def initializer(value, custom_objects):
    """The initializer, or `None`, since its values are replaced, if unknown."""
    if isinstance(value, Mapping) and isinstance(value.get("config"), Mapping):
        config = {k: v for k, v in value["config"].items() if k != "dtype"}
        if config.get("distribution") == "normal":
            config["distribution"] = "truncated_normal"
        value = {**value, "config": config}
    try:
        return _make("initializer", value, custom_objects)
    except FileError:
        return None


def regularizer(value, custom_objects):
    return _make("regularizer", value, custom_objects)


def constraint(value, custom_objects):
    return _make("constraint", value, custom_objects)


def _make(kind, value, custom_objects):
    """An object of a class in Keras's module, from its name or configuration."""
    if value is None:
        return None
    name, config = value, {}
    if isinstance(value, Mapping):
        name, config = value.get("class_name"), value.get("config") or {}
    if not isinstance(name, str) or not isinstance(config, Mapping):
        raise FileError(f"the {kind} {value!r:.80} is not a name or configuration.")
    module, base = _BASES[kind]
    found = find_custom(name, custom_objects)
    if found is None:
        found = vars(module).get(name)
        if found is None and not config:
            found = _by_short_name(module, name)
        is_class = isinstance(found, type) and issubclass(found, base)
        if not is_class and not isinstance(found, base):
            remedy = f"Pass `custom_objects={{{name!r}: ...}}`."
            raise FileError(f"the {kind} {name!r} is not one of Keras. {remedy}")
    try:
        return found(**config) if isinstance(found, type) else found
    except (TypeError, ValueError) as error:
        raise FileError(f"the {kind} {name!r} is invalid: {error}") from error


def _by_short_name(module, name):
    """Find names such as "l2" and "uniform", which are not classes of the module."""
    try:
        return module.get(name)
    except (TypeError, ValueError):
        return None
