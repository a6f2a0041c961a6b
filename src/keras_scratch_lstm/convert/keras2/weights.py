"""Assign the weights of a Keras 2 file to the layers of a model."""

import itertools
import re
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from keras_scratch_lstm import _keras
from keras_scratch_lstm.convert import hard_sigmoid
from keras_scratch_lstm.convert.keras2.files import (
    FileError,
    check_array,
    number,
    snake_case,
)

_GATES = {layers.LSTMCell: 4, layers.GRUCell: 3}  # of the layers for cuDNN
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "ConvLSTMCell")
# The names of weights that are the same in both versions.
_NAMES = (
    *("kernel", "recurrent_kernel", "bias", "embeddings"),
    *("gamma", "beta", "moving_mean", "moving_variance"),
)
# Layers that pass on the last dimension of their inputs.
_KEEP_FEATURES = (layers.Masking, layers.Dropout, layers.GaussianNoise)
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # the latter until 2.14


class _Entry(NamedTuple):
    """The weights that one object has itself, such as a cell, and their datasets."""

    layer: str
    owner: Any
    variables: list[Any]
    datasets: list[Any]


def assign(model, weights, builder):
    """Assign all weights, none before all shapes are those of the file."""
    if weights.groups is None:
        found = set()
        entries = list(_entries_in_tree(model, weights.tree, builder, found))
        for part in builder.parts[model]:
            if {id(v) for _, v in variables(part, builder)} - found:
                raise FileError(f"layer {part.name!r} has weights that are missing.")
    else:
        entries = _entries_in_order(model, weights, builder)
    for entry in entries:
        _named(entry, _check_shapes)
    count = sum(dataset.size for entry in entries for dataset in entry.datasets)
    if count > weights.size:
        rule = f"it must not have more weights than bytes, {weights.size}"
        raise FileError(f"{rule}. Received: {count} weights, compressed or missing.")
    for entry in entries:
        _named(entry, lambda entry: _assign(entry, weights.backend))


def _named(entry, function):
    """Call a function, and name the layer in its error."""
    try:
        return function(entry)
    except ValueError as error:
        raise FileError(f"layer {entry.layer!r}: {error}") from error


# --- layers and files have the same order ------------------------------------


def _entries_in_order(model, weights, builder):
    expected = [(part, variables(part, builder)) for part in builder.parts[model]]
    expected = [(part, found) for part, found in expected if found]
    groups = weights.groups
    if len(expected) != len(groups):
        rule = f"the model has {len(expected)} layers with weights"
        raise FileError(f"{rule}. Received: {len(groups)} such layers in the file.")
    by_name = dict(groups)
    if all(part.name in by_name for part, _ in expected):
        groups = [(part.name, by_name[part.name]) for part, _ in expected]
    entries = []
    for (layer, found), (name, datasets) in zip(expected, groups, strict=True):
        if len(found) != len(datasets):
            rule = f"layer {layer.name!r} has {len(found)} weights"
            raise FileError(
                f"{rule}. Received: {len(datasets)} for {name!r} in the file."
            )
        owners = {}
        pairs = zip(found, datasets.items(), strict=True)
        for (owner, variable), (key, dataset) in pairs:
            _check_name(layer, variable, key)
            entry = _Entry(layer.name, owner, [], [])
            owners.setdefault(owner, entry).variables.append(variable)
            owners[owner].datasets.append(dataset)
        entries += owners.values()
    return entries


def variables(layer, builder):
    """The weights of a layer in Keras 2's order: pairs `(owner, variable)`."""
    trainable, others = _grouped(layer, builder)
    pairs = {id(variable): (owner, variable) for owner, variable in trainable + others}
    return list(pairs.values())


def _grouped(layer, builder):
    """The trainable and the other weights; of frozen layers, all are others."""
    own = [(layer, variable) for variable in _own(layer, builder)]
    trainable = [pair for pair in own if pair[1].trainable]
    others = [pair for pair in own if not pair[1].trainable]
    parts = builder.parts.get(layer, _keras.sublayers(layer))
    groups = [(trainable, others), *(_grouped(part, builder) for part in parts)]
    if not builder.trainable.get(layer, True):
        groups = [([], trainable + others) for trainable, others in groups]
    return [list(itertools.chain(*pairs)) for pairs in zip(*groups, strict=True)]


def _own(layer, builder):
    """The weights that a layer has itself, not in layers within it."""
    parts = builder.parts.get(layer, _keras.sublayers(layer))
    inner = {id(v) for part in parts for v in part.variables}
    states = layer.states if isinstance(layer, layers.RNN) else None
    inner |= {id(v) for v in keras.tree.flatten(states or [])}
    return [variable for variable in layer.weights if id(variable) not in inner]


def _check_name(layer, variable, name):
    """Raise an error if the name in the file is that of another weight."""
    stored = name.rpartition("/")[-1].partition(":")[0]
    if stored in _NAMES and variable.name in _NAMES and stored != variable.name:
        rule = f"layer {layer.name!r}: its weight `{variable.name}` has the name"
        raise FileError(f"{rule} {name!r} in the file.")


# --- files of Keras 2.12 to 2.15 have a tree of objects ----------------------


def _entries_in_tree(layer, node, builder, covered, name=None):
    """Yield the entries of a layer and of the layers within it, named as attributes."""
    name, stored = name or layer.name, node.get("vars", {})
    own = _own(layer, builder) if stored else []
    if len(own) != len(stored):
        rule = f"layer {name!r} has {len(own)} weights of its own"
        raise FileError(f"{rule}. Received: {len(stored)} in the file.")
    covered |= set(map(id, own))
    yield _Entry(name, layer, own, [stored[key] for key in sorted(stored, key=number)])
    for key, child in node.items():
        parts = getattr(layer, key, None)
        if layer in builder.parts:
            parts = builder.parts[layer] if key in _CONTAINERS else None
        if isinstance(parts, layers.Layer):
            yield from _entries_in_tree(parts, child, builder, covered, name)
        elif isinstance(parts, list) and key != "vars":
            yield from _entries_in_list(parts, child, builder, covered)


def _entries_in_list(parts, nodes, builder, covered):
    """Layers of a class are numbered, but not those that came earlier in the file."""
    by_class = {}
    for key in sorted(nodes, key=number):
        by_class.setdefault(re.sub(r"_\d+$", "", key), []).append(nodes[key])
    for part in parts:
        key = snake_case(builder.class_names.get(part, type(part).__name__))
        is_covered = {id(v) for _, v in variables(part, builder)} <= covered
        if not is_covered and by_class.get(key):
            yield from _entries_in_tree(part, by_class[key].pop(0), builder, covered)
    if others := [key for key, found in by_class.items() if found]:
        raise FileError(f"no layer has the weights of {others} in the file.")


# --- arrays ------------------------------------------------------------------


def _check_shapes(entry):
    hard_sigmoid.factors(entry.owner)
    shapes = [tuple(variable.shape) for variable in entry.variables]
    if _is_cudnn(entry):
        shapes[-1] = entry.datasets[-1].shape
    for variable, dataset, shape in zip(
        entry.variables, entry.datasets, shapes, strict=True
    ):
        check_array(variable.name, dataset, shape)


def _assign(entry, backend):
    owner, arrays = entry.owner, [dataset[()] for dataset in entry.datasets]
    if _is_cudnn(entry):
        arrays = _from_cudnn(owner, *arrays)
    if backend == "theano" and type(owner).__name__ in _CONVOLUTIONS:
        arrays = [_flipped(array) for array in arrays]
    for variable, array in zip(entry.variables, arrays, strict=True):
        array = hard_sigmoid.scale(owner, variable, array)
        if _keras.is_deferred(variable):
            _keras.initialize(variable, array)
        else:
            variable.assign(array)
    if isinstance(owner, layers.Normalization):
        vars(owner).pop("finalize_state", None)  # see `Builder`
        owner.finalize_state()


def _is_cudnn(entry):
    """Whether the weights are those of a `CuDNNLSTM` or `CuDNNGRU`, with two biases."""
    gates = _GATES.get(type(entry.owner))
    return bool(gates) and entry.datasets[-1].shape == (2 * gates * entry.owner.units,)


def _from_cudnn(cell, kernel, recurrent_kernel, bias):
    """Convert the weights of a layer for cuDNN, whose order of gates is the same."""
    gates = _GATES[type(cell)]
    # Each gate's matrix is stored with its rows as columns.
    kernels = [k.reshape(k.shape[::-1]).T for k in np.split(kernel, gates, axis=1)]
    recurrent_kernels = [k.T for k in np.split(recurrent_kernel, gates, axis=1)]
    biases = bias.reshape(2, -1)
    if isinstance(cell, layers.LSTMCell):
        biases = biases.sum(axis=0)
    return [np.hstack(kernels), np.hstack(recurrent_kernels), biases]


def _flipped(array):
    """Theano's kernels are flipped in space; biases have no such axes."""
    return (
        np.flip(array, axis=tuple(range(array.ndim - 2))) if array.ndim > 1 else array
    )


def infer_shape(stack, weights):
    """The input shape of a Sequential model that stores none, from its weights."""
    for layer in stack:
        if isinstance(layer, layers.Embedding):
            return (None, None)
        if not isinstance(layer, _KEEP_FEATURES):
            break
    if isinstance(layer, layers.Bidirectional):
        layer = layer.forward_layer
    if weights.groups and isinstance(layer, (layers.RNN, layers.Conv1D, layers.Dense)):
        kernel = next(iter(weights.groups[0][1].values()))
        time = [] if isinstance(layer, layers.Dense) else [None]
        if kernel.ndim > 1:
            return (None, *time, kernel.shape[-2])
    raise FileError(
        "its Sequential model has no input shape. Add `batch_input_shape` to the "
        f"configuration of layer {stack[0].name!r}, or save the model once built."
    )
