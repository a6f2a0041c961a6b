"""Assign the weights of a Keras 2 file to the layers of a model."""

import itertools

import keras
import numpy as np
from keras import layers

from keras_scratch_lstm import _keras
from keras_scratch_lstm.convert.keras2.files import FileError, read_array

_GATES = {layers.LSTMCell: 4, layers.GRUCell: 3}  # of the layers for cuDNN
_CONVOLUTIONS = ("Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "ConvLSTMCell")
# The names of weights that are the same in both versions.
_NAMES = (
    *("kernel", "recurrent_kernel", "bias", "embeddings"),
    *("gamma", "beta", "moving_mean", "moving_variance"),
)
# Layers that pass on the last dimension of their inputs.
_KEEP_FEATURES = (layers.Masking, layers.Dropout, layers.GaussianNoise)


def assign(model, weights, builder):
    """Assign all weights; layers and files have the same order."""
    expected = [(part, variables(part, builder)) for part in builder.parts[model]]
    expected = [(part, found) for part, found in expected if found]
    if len(expected) != len(weights.groups):
        raise FileError(
            f"the model has {len(expected)} layers with weights. Received: "
            f"{len(weights.groups)} such layers in the file."
        )
    for (layer, found), (name, datasets) in zip(expected, weights.groups, strict=True):
        if len(found) != len(datasets):
            raise FileError(
                f"layer {layer.name!r} has {len(found)} weights. Received: "
                f"{len(datasets)} for {name!r} in the file."
            )
        try:
            _assign_layer(found, datasets, weights.backend)
        except FileError as error:
            raise FileError(f"layer {layer.name!r}: {error}") from error


def variables(layer, builder):
    """The weights of a layer in Keras 2's order: pairs `(owner, variable)`."""
    trainable, others = _grouped(layer, builder)
    pairs = {id(variable): (owner, variable) for owner, variable in trainable + others}
    return list(pairs.values())


def _grouped(layer, builder):
    """The trainable and the other weights; of frozen layers, all are others."""
    parts = builder.parts.get(layer, _keras.sublayers(layer))
    inner = {id(v) for part in parts for v in part.variables}
    states = layer.states if isinstance(layer, layers.RNN) else None
    inner |= {id(v) for v in keras.tree.flatten(states or [])}
    own = [(layer, v) for v in layer.weights if id(v) not in inner]
    trainable = [pair for pair in own if pair[1].trainable]
    others = [pair for pair in own if not pair[1].trainable]
    groups = [(trainable, others), *(_grouped(part, builder) for part in parts)]
    if not builder.trainable.get(layer, True):
        groups = [([], trainable + others) for trainable, others in groups]
    return [list(itertools.chain(*pairs)) for pairs in zip(*groups, strict=True)]


def _assign_layer(pairs, datasets, backend):
    owners = {}
    for (owner, variable), (name, dataset) in zip(pairs, datasets.items(), strict=True):
        _check_name(variable, name)
        owners.setdefault(owner, []).append((variable, dataset))
    for owner, found in owners.items():
        shapes = [tuple(variable.shape) for variable, _ in found]
        is_cudnn = _is_cudnn(owner, [dataset for _, dataset in found])
        if is_cudnn:
            shapes[-1] = found[-1][1].shape
        arrays = [
            read_array(variable.name, dataset, shape)
            for (variable, dataset), shape in zip(found, shapes, strict=True)
        ]
        if is_cudnn:
            arrays = _from_cudnn(owner, *arrays)
        if backend == "theano" and type(owner).__name__ in _CONVOLUTIONS:
            arrays = [_flipped(array) for array in arrays]
        for (variable, _), array in zip(found, arrays, strict=True):
            variable.assign(array)


def _check_name(variable, name):
    """Raise an error if the name in the file is that of another weight."""
    stored = name.rpartition("/")[-1].partition(":")[0]
    if stored in _NAMES and variable.name in _NAMES and stored != variable.name:
        raise FileError(
            f"its weight `{variable.name}` has the name {name!r} in the file."
        )


def _is_cudnn(owner, datasets):
    """Whether the weights are those of a `CuDNNLSTM` or `CuDNNGRU`, with two biases."""
    gates = _GATES.get(type(owner))
    return bool(gates) and datasets[-1].shape == (2 * gates * owner.units,)


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
