"""Convert a file of Keras 2 into one that Keras 3 opens without this package."""

import os
import tempfile

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm.convert import hard_sigmoid, keras2
from keras_scratch_lstm.convert.keras2.files import open_file

_TOLERANCE = 1e-4  # of the range of the outputs
_STEPS = 7  # for an unknown dimension


def describe(path, weights=None):
    """Yield lines about the model of a file."""
    yield from _lines(path, *keras2.build(path, weights=weights))


def _lines(path, model, builder):
    with open_file(_validation.path("path", path)) as content:
        version = content.version or "2, of unknown version"
    yield f"Keras {version}: {type(model).__name__} {model.name!r}"
    yield "Inputs: " + ", ".join(f"{x.name} {x.shape}" for x in model.inputs)
    for layer in builder.parts[model]:
        kind, old = type(layer).__name__, builder.class_names[layer]
        kind = kind if kind == old else f"{old} -> {kind}"
        yield f"  {layer.name}: {kind}, {_shapes(layer)}{layer.count_params()} weights"
    yield f"Weights: {model.count_params()}"


def convert(old, new, weights=None):
    """Write a Keras 3 archive, check its predictions, and yield lines about it.

    Where Keras 2's hard sigmoid is used, weights are scaled instead.
    """
    original, builder = keras2.build(old, weights=weights)
    yield from _lines(old, original, builder)
    model, builder = keras2.build(old, weights=weights, is_portable=True)
    found = hard_sigmoid.layers_with(model).items()
    scaled = [name for name, layer in found if hard_sigmoid.factors(layer)]
    scaled += [
        f"input of {layer.name}"
        for layer, kind in builder.class_names.items()
        if kind == "Activation" and isinstance(layer, keras.Sequential)
    ]
    for name in scaled:
        yield f"Scaled by {hard_sigmoid.SCALE} for Keras 3's hard_sigmoid: {name}"
    with tempfile.TemporaryDirectory(dir=new.parent) as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        inputs = _random_inputs(original)
        error = _difference(original, keras.saving.load_model(path), inputs)
        if not error <= _TOLERANCE:
            raise ValueError(
                f"Cannot convert {str(old)!r}: predictions of the two models must be "
                f"equal. Received: a relative difference of {error:.1e}"
            )
        os.replace(path, new)
    yield f"Predictions on random inputs differ by {error:.0e} of their range at most."
    yield f"Wrote {new}, which Keras 3 opens: keras.saving.load_model({str(new)!r})"


def _shapes(layer):
    try:
        tensors = keras.tree.flatten(layer.output)
    except (AttributeError, ValueError):  # called several times
        return ""
    return "".join(f"{tensor.shape}, " for tensor in tensors)


def _random_inputs(model):
    rng, parts = np.random.default_rng(0), _keras.all_layers(model)
    sizes = [p.input_dim for p in parts if isinstance(p, keras.layers.Embedding)]
    inputs = []
    for tensor in model.inputs:
        shape = [size or _STEPS for size in tensor.shape[1:]]
        shape = [tensor.shape[0] or 2, *shape]
        if tensor.dtype == "string":
            value = np.full(shape, "a b")
        elif sizes or "int" in tensor.dtype:
            value = rng.integers(0, min(sizes, default=2), shape)
        else:
            value = rng.normal(size=shape)
        if len(shape) > 1 and value.dtype.kind != "U":
            value[0, -2:] = 0  # masked, if the model has a mask
        inputs.append(ops.convert_to_tensor(value, tensor.dtype))
    return inputs if len(inputs) > 1 else inputs[0]


def _difference(one, other, inputs):
    """The largest difference of outputs, relative to their range."""
    pairs = (
        keras.tree.flatten(model(inputs, training=False)) for model in (one, other)
    )
    pairs = [map(ops.convert_to_numpy, outputs) for outputs in pairs]
    return max(
        np.abs(x - y).max() / max(np.ptp(x), 1e-6) for x, y in zip(*pairs, strict=True)
    )
