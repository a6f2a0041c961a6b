"""The functions and small objects in the configurations of Keras 2 layers."""

from collections.abc import Mapping
from contextlib import suppress
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


def activation(value, custom_objects):
    """The function of a name. No other modules are searched for it."""
    if isinstance(value, Mapping) and value.get("class_name") == "function":
        value = value.get("config")
    if not isinstance(value, str):
        raise FileError(f"the activation {value!r:.80} is not supported.")
    if found := find_custom(value, custom_objects):
        return found
    found = vars(keras.activations).get(_RENAMED_ACTIVATIONS.get(value, value))
    getters = ("get", "serialize", "deserialize")
    if isinstance(found, FunctionType) and found.__name__ not in getters:
        return found
    remedy = f"Pass `custom_objects={{{value!r}: ...}}`."
    raise FileError(f"the activation {value!r:.80} is not a Keras activation. {remedy}")


def initializer(value, custom_objects):
    """The initializer, or `None`, since its values are replaced, if unknown."""
    if isinstance(value, Mapping) and isinstance(value.get("config"), Mapping):
        config = {k: v for k, v in value["config"].items() if k != "dtype"}
        if config.get("distribution") == "normal":
            config["distribution"] = "truncated_normal"
        value = {**value, "config": config}
    try:
        return make("initializer", value, custom_objects)
    except FileError:
        return None


def make(kind, value, custom_objects):
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
            with suppress(TypeError, ValueError):  # such as "l2" and "uniform"
                found = module.get(name)
        is_class = isinstance(found, type) and issubclass(found, base)
        if not is_class and not isinstance(found, base):
            remedy = f"Pass `custom_objects={{{name!r}: ...}}`."
            raise FileError(f"the {kind} {name!r} is not one of Keras. {remedy}")
    try:
        return found(**config) if isinstance(found, type) else found
    except (TypeError, ValueError) as error:
        raise FileError(f"the {kind} {name!r} is invalid: {error}") from error
