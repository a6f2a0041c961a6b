"""Find the LSTMs of a model, and capture the arguments the model calls them with."""

import contextlib
import functools
import inspect
import operator
import os
import threading

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.convert.files import load_model
from keras_scratch_lstm.tracing.inputs import check_inputs

_LOCK = threading.RLock()


def load(model_or_layer):
    """Return the model or layer, loaded if it is the path of a file."""
    if isinstance(model_or_layer, (str, os.PathLike)):
        return load_model(model_or_layer)
    if not isinstance(model_or_layer, keras.layers.Layer):
        rule = "a Keras model or layer, or the path of a model's file"
        raise _validation.invalid("model_or_layer", model_or_layer, rule)
    return model_or_layer


def find_all(model):
    """Return the LSTMs that a model calls, in its order; `Bidirectional` is one."""
    return list(dict.fromkeys(_find(model)))


def _find(layer):
    if all(map(_is_lstm, directions_of(layer))):
        yield layer
        return
    for sublayer in _keras.sublayers(layer):
        yield from _find(sublayer)


def _is_lstm(layer):
    cells = ScratchLSTMCell, keras.layers.LSTMCell
    return isinstance(layer, keras.layers.RNN) and isinstance(layer.cell, cells)


def directions_of(layer):
    """Return both layers of a `Bidirectional` layer, or else the layer itself."""
    if isinstance(layer, keras.layers.Bidirectional):
        return [layer.forward_layer, layer.backward_layer]
    return [layer]


def is_stateful(model):
    """Return whether a layer of the model is stateful."""
    return any(getattr(part, "stateful", False) for part in _keras.all_layers(model))


def find_lstms(model, layer=None):
    """Find what the argument `layer` of `trace_gates` selects.

    Returns:
        `(target, lstms)`: the layer that the model calls, and the LSTMs to trace
        in it: one, or both of a `Bidirectional` layer.
    """
    targets = find_all(model)
    if not targets:
        raise ValueError(
            f"`model_or_layer` must be or contain a `ScratchLSTM`, an `LSTM`, or an "
            f"`RNN` with a `ScratchLSTMCell` or an `LSTMCell`. Received: {model.name!r}"
        )
    choices = {target: (target, directions_of(target)) for target in targets}
    for target in targets:
        for lstm in directions_of(target):
            choices.setdefault(lstm, (target, [lstm]))
    found = _select(layer, targets, choices)
    if len(found) > 1:
        raise ValueError(
            f"`layer` must be the layer itself, since {len(found)} LSTMs of "
            f"{model.name!r} have the same name. Received: layer={layer!r}"
        )
    if not found:
        names = [repr(target.name) for target in targets[:8]]
        names += ["…"] * (len(targets) > 8)
        raise ValueError(
            f"`layer` must be the name or index of an LSTM of {model.name!r}, or the "
            f"layer itself. Pass `layer=` to choose one of: {', '.join(names)}. "
            f"Received: layer={getattr(layer, 'name', repr(layer)[:40])}"
        )
    target, lstms = choices[found[0]]
    for lstm in lstms:
        cell = type(lstm.cell)
        if cell is not keras.layers.LSTMCell and not issubclass(cell, ScratchLSTMCell):
            raise ValueError(
                "`layer` must have a `ScratchLSTMCell` (or a subclass) or a plain "
                "`keras.layers.LSTMCell`, whose gates are known. Received: "
                f"{lstm.name!r} with a {cell.__name__!r}"
            )
    return target, lstms


def check_built(model, lstms):
    if not all(layer.built for layer in (model, *(lstm.cell for lstm in lstms))):
        raise ValueError(
            f"`model_or_layer` must be built. Received: {model.name!r}. Call it once "
            "on data, or add `keras.Input`."
        )


def _select(layer, targets, choices):
    if layer is None:
        return targets if len(targets) == 1 else []
    if isinstance(layer, str):
        return [choice for choice in choices if choice.name == layer]
    if isinstance(layer, keras.layers.Layer):
        return [layer] if layer in choices else []
    try:
        return [targets[operator.index(layer)]]
    except (IndexError, TypeError):
        return []


class _Stop(BaseException):
    """Stop the forward pass at the traced layer; `except Exception` ignores it."""


@contextlib.contextmanager
def frozen(model):
    """Discard updates of states; on torch, also the gradients of variables."""
    values = [(v, ops.stop_gradient(v.value)) for v in model.variables]
    try:
        with keras.StatelessScope(values):
            yield
    except BaseException:
        # The cells keep the dropout masks of a call that ends in an error.
        for layer in _keras.all_layers(model):
            if isinstance(layer, _keras.DropoutRNNCell):
                layer.reset_dropout_mask()
                layer.reset_recurrent_dropout_mask()
        raise


@contextlib.contextmanager
def replaced(layer, name, replacement, **attributes):
    """Replace a method of a layer in this thread, and other attributes in all threads.

    Calls become `replacement(original, *args, **kwargs)`.
    """
    thread = threading.get_ident()
    with _LOCK:
        original = getattr(layer, name)

        def method(*args, **kwargs):
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            return replacement(original, *args, **kwargs)

        attributes[name] = method
        # Keras and torch track what `__setattr__` assigns.
        before = {key: vars(layer)[key] for key in attributes if key in vars(layer)}
        vars(layer).update(attributes)
        try:
            yield
        finally:
            for key in attributes:
                del vars(layer)[key]
            vars(layer).update(before)


def capture_calls(model, target, inputs, batch_size):
    """Run a model up to `target`, `batch_size` samples at a time.

    Args:
        model: The model to run, or `target` itself.
        target: The layer at which the forward pass stops.
        inputs: One batch of `read_batches`.
        batch_size: Positive integer.

    Yields:
        Dict of each LSTM in `target` -> keyword arguments of `replay.run`.
    """
    time_major = getattr(model, "time_major", False)
    inputs, samples = check_inputs(inputs, time_major=time_major)
    batch_size, fixed = _batch_sizes(model, samples, batch_size)
    for start in range(0, samples, batch_size):
        size = min(batch_size, samples - start)
        padding = fixed - size if fixed else 0
        batch = inputs
        if size < samples or padding:
            take = functools.partial(_rows, start=start, size=size, padding=padding)
            batch = keras.tree.map_structure(take, inputs)
        calls = _capture(model, target, batch)
        for call in calls.values() if padding else ():
            # A model that folds an axis into the batch has several rows per sample.
            rows = len(call["h"]) * size // fixed
            call.update({key: value[:rows] for key, value in call.items()})
        yield calls


def _rows(x, start, size, padding):
    """Take samples of an input, and repeat the last one."""
    x = x[start : start + size]
    if not padding:
        return x
    return ops.concatenate([ops.convert_to_tensor(x)] + [x[-1:]] * padding)


def _batch_sizes(model, samples, batch_size):
    """Return how many samples to run at a time, and the model's fixed batch size."""
    batch_size = _validation.positive_integer("batch_size", batch_size)
    layers = _keras.all_layers(model)
    if any(getattr(layer, "time_major", False) for layer in layers):
        return samples, None  # the samples may be on either axis of the inputs
    shapes = [x.shape for x in getattr(model, "inputs", None) or []]
    fixed = shapes[0][0] if shapes else None
    for layer in layers:
        if getattr(layer, "stateful", False) and getattr(layer, "states", None):
            fixed = keras.tree.flatten(layer.states)[0].shape[0]
            if samples > fixed:
                raise ValueError(
                    f"`inputs` must have at most {fixed} samples, the batch size of "
                    f"the stateful layer {layer.name!r}. Received: {samples} samples"
                )
    return fixed or batch_size, fixed


def _capture(model, target, batch):
    calls = []

    def record(call, *args, **kwargs):
        calls.append(inspect.signature(call).bind(*args, **kwargs).arguments)
        raise _Stop

    with frozen(model), replaced(target, "call", record):
        with contextlib.suppress(_Stop):
            _forward(model, batch)(batch, training=False)
        if not calls:
            raise ValueError(
                f"`layer` must be called in the model's forward pass. Received: "
                f"{target.name!r}, which {model.name!r} does not call, or only in "
                "compiled code"
            )
        return _split_directions(target, **calls[0])


def _forward(model, batch):
    """Return `model`, or `model.call` if its fixed number of time steps differs.

    A model with `keras.Input((35,))` rejects other lengths, though its LSTM does not.
    """
    inputs = getattr(model, "inputs", None) or []
    if len(inputs) == 1 and hasattr(batch, "shape"):
        fixed, shape = inputs[0].shape, batch.shape
        if len(fixed) == len(shape) > 1 and fixed[1] not in (None, shape[1]):
            return model.call
    return model


def _split_directions(target, sequences, initial_state=None, mask=None, **_):
    """Return the call's arguments for each direction, as batch-major arrays."""
    if keras.tree.is_nested(mask):
        mask = mask[0]
    try:
        sequences = ops.convert_to_numpy(sequences)
    except Exception:
        raise ValueError(
            f"`layer` must be called outside of compiled or vectorized code. "
            f"Received: {target.name!r}. Pass this layer and its own inputs instead."
        ) from None
    if 0 in sequences.shape or not _validation.are_numbers(sequences):
        rule = "real numbers with at least one time step where the layer gets them"
        raise _validation.invalid("inputs", sequences, rule)
    states = [] if initial_state is None else keras.tree.flatten(initial_state)
    calls = {}
    for index, layer in enumerate(directions_of(target)):
        time_major = getattr(layer, "time_major", False)
        if states:
            initial = states[2 * index : 2 * index + 2]
        elif layer.stateful:
            initial = layer.states
        else:
            initial = layer.get_initial_state(sequences.shape[int(time_major)])
        dtype = result_dtype(layer)
        call = {"sequences": sequences.astype(dtype)}
        if mask is not None:
            call["mask"] = _to_numpy(mask, "bool")
        if time_major:
            call = {key: np.swapaxes(value, 0, 1) for key, value in call.items()}
        # A `SimpleRNN` has only h.
        for name, state in zip("hc", initial, strict=False):
            call[name] = _to_numpy(state, dtype)
        calls[layer] = call
    return calls


def result_dtype(layer):
    """Return the dtype of a layer's trace."""
    return "float64" if layer.cell.compute_dtype == "float64" else "float32"


def _to_numpy(x, dtype):
    return ops.convert_to_numpy(ops.cast(x, dtype))
