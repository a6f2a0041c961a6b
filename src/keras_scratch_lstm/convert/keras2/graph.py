"""Build Sequential and Functional models, whose layers a `Builder` makes."""

import functools
import inspect
import re
from collections.abc import Mapping

import keras
import numpy as np
from keras import layers, ops

from keras_scratch_lstm import _keras
from keras_scratch_lstm.convert.keras2 import operations
from keras_scratch_lstm.convert.keras2.files import FileError

_CONSTANT = "_CONSTANT_VALUE"
_MERGING = (
    *(layers.Add, layers.Subtract, layers.Multiply, layers.Average),
    *(layers.Maximum, layers.Minimum, layers.Concatenate),
)


def read(spec):
    """The class name of a layer or model, and its configuration."""
    if isinstance(spec, Mapping):
        class_name, config = spec.get("class_name"), spec.get("config")
        if class_name == "Sequential" and isinstance(config, list):
            config = {"layers": config}  # until Keras 2.2.2
        if isinstance(class_name, str) and isinstance(config, Mapping):
            return class_name, config
    raise FileError(f"{spec!r:.80} is not the configuration of a layer.")


def unique_name(name, taken=()):
    """A name that is valid in Keras 3 on all backends, and not taken."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    name = name if name[:1].isalnum() else f"layer_{name.lstrip('_')}"
    numbered = (f"{name}_{k}" for k in range(1, len(taken) + 1))
    return next(each for each in (name, *numbered) if each not in taken)


def input_tensor(config, taken=()):
    """The input that an `InputLayer` describes."""
    shape = config.get("batch_input_shape", config.get("batch_shape"))
    if not isinstance(shape, (list, tuple)):
        raise FileError(f"an input has no shape. Received: {shape!r}")
    if config.get("ragged"):
        raise FileError("Keras 3 has no ragged inputs.")
    dtype, name = config.get("dtype"), config.get("name")
    return keras.Input(
        batch_shape=tuple(shape),
        dtype=dtype if isinstance(dtype, str) else None,
        sparse=bool(config.get("sparse")),
        name=name and unique_name(name, taken),
    )


# --- Sequential --------------------------------------------------------------


def sequential(builder, config, is_outermost=False):
    """Build a Sequential model. Without an input shape, only the outermost is built."""
    specs, taken = list(config["layers"]), set()
    class_name, first = read(specs[0]) if specs else (None, {})
    inputs = []
    if class_name == "InputLayer":
        inputs = [input_tensor(first)]
        taken.add(inputs[0].name)
        specs = specs[1:]
    stack = []
    for spec in specs:
        stack.append(builder.layer(spec, taken))
        taken.add(stack[-1].name)
    if not stack:
        raise FileError("a Sequential model has no layers.")
    if not inputs:
        shape = _input_shape(stack[0], first)
        if shape is None and is_outermost:
            is_stateful = not set(stack).isdisjoint(builder.stateful)
            shape = _build_shape(config, is_stateful) or builder.infer_shape(stack)
        if shape is not None:
            name = f"{stack[0].name}_input"
            first = {**first, "batch_input_shape": shape, "name": name}
            inputs = [input_tensor(first, taken)]
    name = config.get("name") and unique_name(config["name"])
    model = keras.Sequential([*inputs, *stack], name=name)
    builder.parts[model] = stack
    return model


def _input_shape(layer, config):
    """The shape that the first layer stores, or that it has as a model."""
    if isinstance(layer, keras.Model):
        return layer.input_shape if layer.built else None
    # Keras 2 did not read the shape that a wrapped layer stores.
    inner = config.get("layer", {}).get("config", {})
    is_inner = isinstance(layer, layers.Bidirectional)
    default = inner.get("batch_input_shape") if is_inner else None
    return config.get("batch_input_shape", default)


def _build_shape(config, is_stateful):
    """The shape of the inputs that built the model, of any batch size."""
    shape = config.get("build_input_shape")
    return shape if is_stateful or not shape else [None, *shape[1:]]


# --- Functional --------------------------------------------------------------


def functional(builder, config):
    """Build a Functional model: make its layers, then call them as its nodes say."""
    graph = _Graph(config)
    taken, parts = graph.taken, []
    for key, spec in graph.specs.items():
        class_name, arguments = read(spec)
        if class_name == "InputLayer":
            tensor = input_tensor(arguments, taken)
            graph.outputs[key] = [[tensor]]
            taken.add(tensor.name)
        elif class_name in operations.CLASSES:
            graph.layers[key] = operations.operation(class_name, arguments)
            graph.outputs[key] = []
        else:
            parts.append(builder.layer(spec, taken))
            graph.layers[key] = parts[-1]
            graph.outputs[key] = []
            taken.add(parts[-1].name)
    graph.call_layers(builder.call_arguments)
    name = config.get("name") and unique_name(config["name"])
    inputs, outputs = (
        graph.tensors(config[f"{k}_layers"]) for k in ("input", "output")
    )
    model = keras.Model(_unpack(inputs), _unpack(outputs), name=name)
    builder.parts[model] = parts
    return model


def _masks(layer, inputs, arguments):
    """The masks to call a layer with; Keras 3 passes on only that of one tensor."""
    tensors = {"mask": inputs}
    if isinstance(layer, layers.MultiHeadAttention):
        keys = (key for key in ("value", "key") if arguments.get(key) is not None)
        tensors = {"query_mask": inputs, **{f"{k}_mask": arguments[k] for k in keys}}
    elif "mask" not in inspect.signature(layer.call).parameters:
        return {}
    get = functools.partial(keras.tree.map_structure, _keras.get_keras_mask)
    masks = {name: get(value) for name, value in tensors.items()}
    return {k: v for k, v in masks.items() if set(keras.tree.flatten(v)) != {None}}


def _merged_mask(layer, inputs):
    """The mask of merged inputs: in Keras 2, where all have data; in Keras 3, any."""
    masks = [_keras.get_keras_mask(x) for x in inputs]
    if all(mask is None for mask in masks):
        return None
    axis = getattr(layer, "axis", -1) % len(inputs[0].shape)
    if isinstance(layer, layers.Concatenate) and axis < len(inputs[0].shape) - 1:
        pairs = zip(inputs, masks, strict=True)
        masks = [ops.ones_like(x[..., 0], "bool") if m is None else m for x, m in pairs]
        return ops.concatenate(masks, axis=axis)
    return functools.reduce(ops.logical_and, [m for m in masks if m is not None])


class _Graph:
    """The calls of the layers of a model.

    A reference `[name, node, index]`, which may have the arguments of the call as a
    fourth item, is an output of one of the calls of a layer. A constant has its value
    as `index`.
    """

    def __init__(self, config):
        self.specs, self.nodes, self.layers, self.outputs = {}, {}, {}, {}
        self.taken, self.named = set(), set()
        for spec in config["layers"]:
            _, arguments = read(spec)
            key = spec.get("name", arguments.get("name"))
            if key in self.specs:
                raise FileError(f"two layers have the name {key!r}.")
            self.specs[key] = spec
            self.nodes[key] = list(spec.get("inbound_nodes") or [])
        # In some versions a model within the model has its own graph as node 0.
        last = dict.fromkeys(self.specs, 0)
        for name, node, *_ in _references([self.nodes, config["output_layers"]]):
            last[name] = max(last.get(name, 0), node)
        calls = {key: len(nodes) or 1 for key, nodes in self.nodes.items()}
        self.offset = {key: max(0, last[key] + 1 - calls[key]) for key in self.specs}

    def call_layers(self, call_arguments):
        """Call every layer, as soon as the outputs that it takes exist."""
        waiting = [key for key in self.layers if self.nodes[key]]
        while waiting:
            ready = [key for key in waiting if self._is_ready(key)]
            if not ready:
                raise FileError(f"the inputs of layer {waiting[0]!r} do not exist.")
            for key in ready:
                node, layer = self.nodes[key][len(self.outputs[key])], self.layers[key]
                result = self._call(key, node, call_arguments.get(layer, {}))
                self.outputs[key].append(keras.tree.flatten(result))
            waiting = [
                key for key in waiting if len(self.outputs[key]) < len(self.nodes[key])
            ]

    def _is_ready(self, key):
        node = self.nodes[key][len(self.outputs[key])]
        return all(
            name in self.outputs and index - self.offset[name] < len(self.outputs[name])
            for name, index, *_ in _references(node)
            if name != _CONSTANT
        )

    def _call(self, key, node, arguments):
        layer, inputs = self.layers[key], _unpack(self.tensors(node))
        for _, _, _, *rest in _references(node):
            stored = rest[0] if rest else {}
            given = {k: self.tensors(v) for k, v in stored.items() if v is not None}
            arguments = arguments | given
        has_states = isinstance(layer, (layers.RNN, layers.Bidirectional))
        if has_states and isinstance(inputs, list):
            inputs, *states = inputs
            arguments = {"initial_state": states, **arguments}
        try:
            if isinstance(layer, layers.Layer):
                arguments = _masks(layer, inputs, arguments) | arguments
            mask = _merged_mask(layer, inputs) if isinstance(layer, _MERGING) else None
            if mask is not None and isinstance(layer, layers.Multiply):
                # That of Keras 3 has 1 in place of masked values.
                layer = functools.partial(functools.reduce, ops.multiply)
            result = layer(inputs, **arguments)
            if mask is not None:
                _keras.set_keras_mask(result, mask)
            self._name_operations(key, result)
            masks = map(_keras.get_keras_mask, keras.tree.flatten(result))
            self._name_operations(f"{key}_mask", [m for m in masks if m is not None])
        except Exception as error:  # of any type, depending on the backend
            reason = str(error).partition("\n")[0]
            raise FileError(f"layer {key!r} cannot be called: {reason}") from error
        return result

    def _name_operations(self, key, tensors):
        """Name new operations as in the file; layers may have Keras's own names."""
        for operation in map(_keras.operation, keras.tree.flatten(tensors)):
            is_layer = isinstance(operation, layers.Layer)
            if not is_layer and operation not in self.named:
                operation.name = unique_name(key, self.taken)
                self.taken.add(operation.name)
                self.named.add(operation)
                self._name_operations(key, operation.input)

    def tensors(self, value):
        """Replace the references in a nested structure by their tensors."""
        if _is_reference(value):
            name, node, index, *_ = value
            if name == _CONSTANT:
                return np.asarray(index) if isinstance(index, list) else index
            node -= self.offset.get(name, 0)
            if name not in self.outputs or node < 0 or index < 0:
                raise FileError(f"the output {value!r:.80} does not exist.")
            try:
                return self.outputs[name][node][index]
            except IndexError:
                raise FileError(f"the output {value!r:.80} does not exist.") from None
        if isinstance(value, list):
            return [self.tensors(item) for item in value]
        if isinstance(value, Mapping):
            return {key: self.tensors(item) for key, item in value.items()}
        return value


def _is_reference(value):
    if not isinstance(value, list) or len(value) not in (3, 4):
        return False
    name, node, index, *arguments = value
    types = isinstance(name, str), isinstance(node, int), isinstance(index, int)
    is_valid = all(types) or (name == _CONSTANT and node == -1)
    return is_valid and all(isinstance(each, Mapping) for each in arguments)


def _references(value):
    """All references in a nested structure, those within arguments included."""
    if _is_reference(value):
        yield value
        value = value[3:]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)


def _unpack(values):
    return values[0] if isinstance(values, list) and len(values) == 1 else values
