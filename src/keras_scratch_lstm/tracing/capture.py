"""Find the LSTM in a model, and record what the model calls it with."""

import contextlib
import inspect
import threading

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm.cell import ScratchLSTMCell


def find_lstms(model_or_layer, layer=None):
    """The layer that a trace is of: see `trace_gates`.

    Returns:
        `(target, lstms)`: the layer that the model calls, and what is traced of
        it, one LSTM, or both of a `Bidirectional` layer.
    """
    if not isinstance(model_or_layer, keras.layers.Layer):
        raise ValueError(
            f"`model_or_layer` is {model_or_layer!r}; expected a Keras model or layer."
        )
    name = model_or_layer.name
    targets = list(dict.fromkeys(_lstms(model_or_layer)))
    if not targets:
        raise ValueError(
            f"`model_or_layer` is {name!r}, which has no LSTM; expected a `ScratchLSTM`"
            ", an `LSTM`, an `RNN` over a `ScratchLSTMCell` or an `LSTMCell`, or a "
            "model with one."
        )
    names = ", ".join(repr(target.name) for target in targets)
    choices = {target: directions_of(target) for target in targets}
    of = {target: target for target in targets}
    if layer is None:
        found = targets
        if len(found) > 1:
            raise ValueError(
                f"`layer` is None, and {name!r} has {len(found)} LSTMs; expected one "
                f"of {names}."
            )
    else:
        for target in targets:
            for direction in directions_of(target):
                choices.setdefault(direction, [direction])
                of.setdefault(direction, target)
        found = [
            choice
            for choice in choices
            if layer is choice or (isinstance(layer, str) and layer == choice.name)
        ]
        if not found:
            raise ValueError(
                f"`layer` is {getattr(layer, 'name', layer)!r}, which is no LSTM of "
                f"{name!r}; expected one of {names}."
            )
        if len(found) > 1:
            raise ValueError(
                f"`layer` is {layer!r}, the name of {len(found)} LSTMs of {name!r}; "
                "expected the layer itself."
            )
    target, lstms = of[found[0]], choices[found[0]]
    for lstm in lstms:
        cell = type(lstm.cell)
        if not issubclass(cell, ScratchLSTMCell) and cell is not keras.layers.LSTMCell:
            raise ValueError(
                f"`layer` is {lstm.name!r}, whose cell is of {cell.__name__}, a "
                "subclass of `keras.layers.LSTMCell` that may have gates of its own; "
                "expected a `keras.layers.LSTMCell` itself, or a subclass of "
                "`ScratchLSTMCell`."
            )
    return target, lstms


def _lstms(layer):
    """The LSTMs in a layer, in the model's order."""
    directions = directions_of(layer)
    if all(
        isinstance(direction, keras.layers.RNN)
        and isinstance(direction.cell, (ScratchLSTMCell, keras.layers.LSTMCell))
        for direction in directions
    ):
        yield layer
        return
    # `model.layers` has no layers within layers that are not models.
    for sublayer in layer._flatten_layers(include_self=False, recursive=False):
        yield from _lstms(sublayer)


def directions_of(layer):
    if isinstance(layer, keras.layers.Bidirectional):
        return [layer.forward_layer, layer.backward_layer]
    return [layer]


# --- what it is called with --------------------------------------------------


class _Reached(BaseException):
    """Ends a forward pass at the traced layer; no `except Exception` stops it."""


_LOCK = threading.RLock()


@contextlib.contextmanager
def _stop_at(layer, calls):
    """In this thread, calls of the layer are recorded, and end there."""
    thread = threading.get_ident()
    with _LOCK:
        call = layer.call
        signature = inspect.signature(call)
        its_own = "call" in vars(layer)

        def record(*args, **kwargs):
            if threading.get_ident() != thread:
                return call(*args, **kwargs)
            calls.append(signature.bind(*args, **kwargs).arguments)
            raise _Reached

        # Past `__setattr__`, with which Keras and torch keep their books.
        vars(layer)["call"] = record
        try:
            yield
        finally:
            if its_own:
                vars(layer)["call"] = call
            else:
                del vars(layer)["call"]


def calls_of(model, target, inputs, batch_size):
    """What each LSTM is called with, batch after batch.

    Yields:
        `(first, size, samples, calls)`: the batch's first sample and its size, the
        number of all, and a dict of layer to arguments.
    """
    inputs, samples = check_inputs(
        inputs, time_major=getattr(model, "time_major", False)
    )
    batch_size = _batch_size(model, samples, batch_size)

    for start in range(0, samples, batch_size):
        batch = inputs
        if batch_size < samples:
            batch = keras.tree.map_structure(
                lambda x, start=start: x[start : start + batch_size], inputs
            )
        calls = []
        # Whatever the layers assign to their states is forgotten. And torch
        # records no gradients of values that are cut off from their variables.
        values = [(v, ops.stop_gradient(v.value)) for v in model.variables]
        with keras.StatelessScope(values), _stop_at(target, calls):
            with contextlib.suppress(_Reached):
                model(batch, training=False)
            if not calls:
                raise ValueError(
                    f"`layer` is {target.name!r}, which {model.name!r} does not call "
                    "in its forward pass, or in a compiled part of it alone; expected "
                    "one that it calls in the open."
                )
            arguments = _by_direction(target, **calls[0])
        yield start, min(batch_size, samples - start), samples, arguments


def check_inputs(inputs, argument="inputs", time_major=False):
    """Inputs of a model as arrays, and how many samples they are."""
    inputs = keras.tree.map_structure(
        lambda x: x if hasattr(x, "shape") else np.array(x), inputs
    )
    arrays = keras.tree.flatten(inputs)
    shapes = [tuple(x.shape) for x in arrays]
    sizes = {shape[time_major] if len(shape) > time_major else 0 for shape in shapes}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"`{argument}` has the shape{'s' * (len(shapes) != 1)} "
            f"{', '.join(map(str, shapes)) or 'of none'}; expected arrays of as many "
            "samples each, at least one."
        )
    if any(
        str(getattr(x, "dtype", "")) == "object" and not _is_text(x) for x in arrays
    ):
        raise ValueError(
            f"`{argument}` has the dtype object; expected arrays of numbers."
        )
    return inputs, sizes.pop()


def _is_text(array):
    """Whether they are strings, as pandas has them, for a model that takes those."""
    return all(isinstance(value, (str, bytes)) for value in np.ravel(array))


def _batch_size(model, samples, batch_size):
    """How many samples to run at a time, for this model."""
    batch_size = _validation.positive_integer("batch_size", batch_size)
    for layer in model._flatten_layers():
        if getattr(layer, "time_major", False):
            # Nobody knows on which axis of the model's inputs the samples are.
            batch_size = samples
        if getattr(layer, "stateful", False) and getattr(layer, "states", None):
            expected = keras.tree.flatten(layer.states)[0].shape[0]
            if samples != expected:
                raise ValueError(
                    f"`inputs` has {samples} samples, and {layer.name!r} is stateful; "
                    f"expected {expected}, the batch size of its states."
                )
            batch_size = samples
    return batch_size


def _by_direction(target, sequences, initial_state=None, mask=None, **_):
    """The arguments of a call as each LSTM gets them, as arrays, batch-major."""
    if keras.tree.is_nested(mask):
        mask = mask[0]
    try:
        sequences = ops.convert_to_numpy(sequences)
    except Exception:
        raise ValueError(
            f"`layer` is {target.name!r}, which is called where its inputs can't be "
            "seen, in a compiled or vectorized part of the model; expected one called "
            "in the open, or the layer itself with its own inputs."
        ) from None
    if 0 in sequences.shape or not _validation.are_numbers(sequences):
        raise ValueError(
            f"`inputs` reach {target.name!r} as {_validation.dtype_of(sequences)} of shape "
            f"{sequences.shape}; expected real numbers, and at least one step."
        )
    given = [] if initial_state is None else keras.tree.flatten(initial_state)
    calls = {}
    for index, layer in enumerate(directions_of(target)):
        time_major = getattr(layer, "time_major", False)
        if given:
            h, c = given[2 * index : 2 * index + 2]
        elif layer.stateful:
            h, c = layer.states
        else:
            h, c = layer.get_initial_state(sequences.shape[1 if time_major else 0])
        dtype = "float64" if layer.cell.compute_dtype == "float64" else "float32"
        call = {
            "sequences": sequences.astype(dtype),
            "h": _to_numpy(h, dtype),
            "c": _to_numpy(c, dtype),
            "mask": None if mask is None else _to_numpy(mask, "bool"),
        }
        if time_major:
            for key in ("sequences", "mask"):
                call[key] = None if call[key] is None else np.swapaxes(call[key], 0, 1)
        calls[layer] = call
    return calls


def _to_numpy(x, dtype):
    return ops.convert_to_numpy(ops.cast(x, dtype))
