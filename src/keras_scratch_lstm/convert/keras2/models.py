"""Build the layers and models of a Keras 2 configuration in Keras 3."""

import math
import re
from collections.abc import Mapping

import keras

from keras_scratch_lstm import _keras
from keras_scratch_lstm.convert import hard_sigmoid
from keras_scratch_lstm.convert.keras2 import graph, layers, objects
from keras_scratch_lstm.convert.keras2.files import FileError, number, snake_case

_MODELS = {
    "Sequential": graph.sequential,
    "Functional": graph.functional,
    "Model": graph.functional,  # until TensorFlow 2.3
}
_OBJECTS = ("initializer", "regularizer", "constraint")
_MOST_STATES = 2**24  # of a stateful layer, which the file does not have
_MODULES = tuple(f"keras.{name}s" for name in ("layer", "activation", *_OBJECTS))


class Builder:
    """Builds layers, and keeps what the layers themselves do not.

    Attributes:
        trainable: Dict of each layer and its `trainable`, outer layers first.
        parts: Dict of each model and its layers, in the order of the file.
        class_names: Dict of each layer and its class in Keras 2.
        is_portable: Whether the model has no function that Keras 3 does not have.
        call_arguments: Dict of layers and the arguments to call them with.
    """

    def __init__(self, custom_objects, infer_shape, vocabularies=(), is_portable=False):
        functions = {"hard_sigmoid": hard_sigmoid.keras2_hard_sigmoid}
        self.custom_objects = ({} if is_portable else functions) | custom_objects
        self.infer_shape = infer_shape
        self.vocabularies, self.is_portable = dict(vocabularies), is_portable
        self.trainable, self.parts, self.class_names = {}, {}, {}
        self.call_arguments, self.stateful = {}, []

    def model(self, spec):
        """Build the outermost model."""
        class_name, config = graph.read(spec)
        if class_name not in _MODELS:
            rule = f"must be among {', '.join(_MODELS)}"
            raise FileError(f"the class of its model {rule}. Received: {class_name}")
        options = {"is_outermost": True} if class_name == "Sequential" else {}
        model = _MODELS[class_name](self, config, **options)
        self.trainable = {model: _is_trainable(config), **self.trainable}
        return model

    def finish(self, deferred, most):
        """Make what the file does not have, such as states; freeze layers."""
        for variable in filter(_keras.is_deferred, deferred):
            if math.prod(variable.shape) > most:
                raise FileError(f"its variable {variable.path!r} is not in the file.")
            _keras.initialize(variable)
        for layer in self.stateful:
            _make_states(layer, max(most, _MOST_STATES))
        for layer, trainable in self.trainable.items():
            if not trainable:
                layer.trainable = False

    def layer(self, spec, taken=()):
        """Build a layer or nested model, with a name that is not taken."""
        class_name, config = graph.read(spec)
        name = str(config.get("name") or class_name)
        config = {**config, "name": graph.unique_name(name, taken)}
        trainable, outer, self.trainable = _is_trainable(config), self.trainable, {}
        try:
            layer = self._layer(class_name, name, config)
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]
            raise FileError(f"layer {name!r} ({class_name}): {reason}") from error
        self.trainable = {**outer, layer: trainable, **self.trainable}
        self.class_names[layer] = class_name
        return layer

    def _layer(self, class_name, name, config):
        custom = objects.find_custom(class_name, self.custom_objects)
        if custom is None and class_name in _MODELS:
            return _MODELS[class_name](self, config)
        if custom is None and class_name == "Lambda":
            return self._lambda(name, config)
        layers.clean(config)
        if custom is not None:
            return custom.from_config(_without_modules(config))
        is_hard = class_name == "Activation" and config["activation"] == "hard_sigmoid"
        if is_hard and self.is_portable:
            return hard_sigmoid.activation_layer(config["name"])
        if config.get("vocabulary", "") is None:
            config["vocabulary"] = self._vocabulary(class_name)
        is_stateful = _pop_stateful(class_name, config)
        is_causal = class_name.endswith("Attention") and config.pop("causal", False)
        cls = layers.translate(class_name, config)
        layer = cls(**{key: self._argument(key, v) for key, v in config.items()})
        if isinstance(layer, layers.PASSING_MASKS + layers.DROPPING_MASKS):
            layer.supports_masking = isinstance(layer, layers.PASSING_MASKS)
        if is_stateful:
            self.stateful.append(layer)
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            vars(layer)["finalize_state"] = lambda: None  # before it has weights
        if is_causal:
            self.call_arguments[layer] = {"use_causal_mask": True}
        return layer

    def _argument(self, key, value):
        """Build what an argument of a layer describes."""
        kind = key.rpartition("_")[-1]
        if kind == "activation" and value is not None:
            if isinstance(value, Mapping) and value.get("class_name") != "function":
                return self.layer(value)
            return objects.activation(value, self.custom_objects)
        if kind == "initializer":
            return objects.initializer(value, self.custom_objects)
        if kind in _OBJECTS:
            return objects.make(kind, value, self.custom_objects)
        if key in ("layer", "backward_layer", "cell"):
            return self.layer(value)
        if key == "cells":
            return [self.layer(cell) for cell in value]
        if isinstance(value, Mapping):
            raise FileError(f"`{key}` must not be a dict. Received: {value!r:.80}")
        return value

    def _vocabulary(self, class_name):
        """The next vocabulary of a class in an archive, or `None`."""
        pattern = re.compile(rf"/{snake_case(class_name)}(_\d+)?/vocabulary\.txt")
        found = {path: pattern.search(path) for path in self.vocabularies}
        paths = sorted(
            filter(found.get, found), key=lambda path: number(found[path][1])
        )
        return self.vocabularies.pop(paths[0]) if paths else None

    def _lambda(self, name, config):
        """Build a `Lambda` with a function of the user, never with the file's code."""
        function = self.custom_objects.get(name)
        if function is None and isinstance(config.get("function"), str):
            function = objects.find_custom(config["function"], self.custom_objects)
        if not callable(function):
            remedy = f"Pass its function: `custom_objects={{{name!r}: function}}`."
            raise FileError(f"code in files is not run. {remedy}")
        arguments = config.get("arguments") or {}
        return keras.layers.Lambda(function, arguments=arguments, name=config["name"])


def _is_trainable(config):
    return config.get("trainable", True) is not False


def _pop_stateful(class_name, config):
    """Whether a layer is stateful; it is made so once it has weights."""
    configs = [config]
    if class_name == "Bidirectional":
        specs = [config.get("layer"), config.get("backward_layer")]
        configs = [graph.read(spec)[1] for spec in specs if spec]
    return True in [each.pop("stateful", False) for each in configs]


def _make_states(layer, most):
    layer.stateful, wrapped = True, ("forward_layer", "backward_layer")
    for part in dict.fromkeys(getattr(layer, name, layer) for name in wrapped):
        config = part.get_build_config()
        shapes = config.get(
            "shapes_dict", {"sequences_shape": config.get("input_shape")}
        )
        shape = part.compute_output_shape(shapes["sequences_shape"])
        shape = shape[0] if part.return_state else shape
        shape = (shape[0], *shape[2:]) if part.return_sequences else shape
        if math.prod(size or 1 for size in shape) > most:
            rule = f"its state must have at most {most} numbers"
            raise FileError(f"layer {layer.name!r}: {rule}. Received: shape={shape}")
        part.stateful = True
        part.build(**shapes)


def _without_modules(value):
    """Remove the modules in a configuration that Keras would import."""
    if isinstance(value, list):
        return [_without_modules(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    value = {key: _without_modules(item) for key, item in value.items()}
    if "class_name" in value and value.get("module") not in _MODULES:
        value.pop("module", None)
        value.pop("registered_name", None)
    return value
