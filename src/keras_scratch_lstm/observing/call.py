"""Run a model without side effects, and observe a call of one of its layers."""

import collections
import contextlib
import functools

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation, recurrence
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.loop import Loop
from keras_scratch_lstm.observing.replaced import replaced


def run(model, batch, lstms, maps=None, record=(), call_index=0, needs_outputs=True):
    """Run a model in inference mode, with the loops of some layers observed.

    Variables keep their values.

    Args:
        model: A built model or layer.
        batch: A `Batch`.
        lstms: List of recurrent layers.
        maps: Function `(lstm, shapes, mask)` that returns a dict of array name ->
            `Map`. `shapes` is a dict of array name -> `(batch, time, size)`. An error
            that it raises ends the run. Default: `None`, nothing is changed.
        record: Sequence of array names; also `"x"`, the layer's inputs, and with them
            the initial states, `"h_0"` and `"c_0"`.
        call_index: Integer, which of the calls of each layer to observe.
        needs_outputs: Boolean, whether an error after these calls is raised.

    Returns:
        `(outputs, arrays)`: nested tensors, with their masks, and a dict of layer ->
        dict of array name -> NumPy array; also `"mask"` if there is one.
    """
    calls, arrays, errors = collections.Counter(), {}, []
    observed = dict.fromkeys(_slow(model), False) | dict.fromkeys(lstms, True)
    # Here, since no variables can be created within the scope of `_frozen`.
    loops = {lstm: _loop_of(lstm) for lstm in observed}

    def inner_loop(lstm, _, sequences, initial_state, mask=None, **options):
        loop, index = loops[lstm], calls[lstm]
        calls[lstm] += 1
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        states = keras.tree.flatten(initial_state)
        if not observed[lstm] or index != call_index:
            return loop(sequences, states, mask, None, ())[:3]
        with _keep_errors(errors):
            arguments = sequences, states, mask
            found = arrays[lstm] = _record_arguments(lstm, *arguments, record)
            shape = *sequences.shape[:2], lstm.cell.units
            shapes = dict.fromkeys(loop.arrays, shape) | {"x": tuple(sequences.shape)}
            changes = maps and maps(lstm, shapes, found.get("mask"))
            names = tuple(name for name in loop.arrays if name in record)
            *results, recorded = loop(*arguments, changes, names)
            _check_observed(lstm, loop, changes or ())
        found.update(recorded)
        if "mask" in found:
            for values in recorded.values():
                values[~found["mask"]] = np.nan
        return results

    try:
        with _frozen(model), contextlib.ExitStack() as stack:
            if record:
                stack.enter_context(recurrence.no_gradients())
            stack.enter_context(_loops_replaced(observed, inner_loop))
            outputs = _forward(model, batch.inputs)(batch.inputs, training=False)
    except Exception:
        if errors:  # without what Keras adds to errors in a layer's call
            raise errors[0] from None
        if needs_outputs or any(calls[lstm] <= call_index for lstm in lstms):
            raise
        outputs = ()
    for lstm in lstms:
        _check_called(model, lstm, calls[lstm], call_index)
    return map_with_masks(batch.crop, outputs), crop_arrays(batch, arrays)


def evaluate(model, values, inputs, lstms=(), x=None, call_index=0):
    """Run a model in inference mode, as a function of tensors that can be compiled.

    Args:
        model: A built model or layer.
        values: List of tensors, those of `model.variables`.
        inputs: Nested tensors, the inputs of the model.
        lstms: List of recurrent layers to run on other inputs. Default: none.
        x: Tensor of shape `(batch, time, features)`, these inputs.
        call_index: Integer, which of the calls of each layer to change.

    Returns:
        Nested tensors, the outputs.
    """
    calls = collections.Counter()
    slow = [] if recurrence.is_compiled() else _slow(model)
    loops = {lstm: _loop_of(lstm) for lstm in slow}  # no variables in the scope below

    def inner_loop(lstm, original, sequences, initial_state, mask=None, **options):
        index = calls[lstm]
        calls[lstm] += 1
        if lstm in lstms and index == call_index:
            sequences = ops.cast(x, sequences.dtype)
        if lstm not in loops:
            return original(sequences, initial_state, mask, **options)
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        states = keras.tree.flatten(initial_state)
        return loops[lstm](sequences, states, mask, None, ())[:3]

    changed = dict.fromkeys([*lstms, *loops])
    with _frozen(model, values), _loops_replaced(changed, inner_loop):
        return _forward(model, inputs)(inputs, training=False)


def masked_inputs(model, inputs):
    """Return the inputs of each call of a `Masking` layer, and its `mask_value`."""
    found = []

    def call(layer, original, tensor):
        found.append((ops.convert_to_numpy(tensor), layer.mask_value))
        return original(tensor)

    layers = _keras.all_layers(model)
    layers = [layer for layer in layers if isinstance(layer, keras.layers.Masking)]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            method = functools.partial(call, layer)
            stack.enter_context(replaced(layer, "call", method))
        if layers:
            evaluate(model, values_of(model), inputs)
    return found


@contextlib.contextmanager
def _loops_replaced(lstms, inner_loop):
    """Run `inner_loop(lstm, original, …)` in place of the loops of some layers."""
    with contextlib.ExitStack() as stack:
        for lstm in lstms:
            # On a GPU, `Bidirectional` runs cuDNN instead of its layers if they allow.
            method = functools.partial(inner_loop, lstm)
            scope = replaced(lstm, "inner_loop", method, use_cudnn=False)
            stack.enter_context(scope)
        yield


def crop_arrays(batch, arrays):
    """Remove the padding of a batch from arrays of layers: dicts by layer and name."""
    return {
        lstm: {name: batch.crop(values) for name, values in found.items()}
        for lstm, found in arrays.items()
    }


def map_with_masks(function, *outputs):
    """Map nested outputs of a model as `keras.tree.map_structure`, and their masks."""

    def apply(*tensors):
        result = function(*tensors)
        masks = [_keras.get_keras_mask(tensor) for tensor in tensors]
        if all(mask is not None for mask in masks):
            _keras.set_keras_mask(result, function(*masks))
        return result

    return keras.tree.map_structure(apply, *outputs)


def _loop_of(lstm):
    if not hasattr(lstm, "_observed_loop"):
        lstm._observed_loop = Loop(lstm)
    return lstm._observed_loop


def _slow(model):
    """Return the LSTMs of the model whose own loops are slow outside of a graph."""
    layers = [keras.layers.LSTM, keras.layers.RNN]
    layers += [ScratchLSTM] if recurrence.is_compiled() else []
    cells = keras.layers.LSTMCell, ScratchLSTMCell
    return [
        lstm
        for found in models.find_all(model)
        for lstm in models.directions_of(found)
        if type(lstm) in layers and type(lstm.cell) in cells
    ]


def _record_arguments(lstm, sequences, states, mask, record):
    """Check the arguments of a call, and return those to record as arrays."""
    if not _validation.are_numbers(sequences):
        rule = "real numbers where the layer gets them"
        raise _validation.invalid("inputs", sequences, rule)
    found = {}
    try:
        if mask is not None:
            found["mask"] = ops.convert_to_numpy(ops.cast(mask, "bool"))
        if "x" in record:
            dtype = result_dtype(lstm)
            values = {"x": sequences} | dict(zip(("h_0", "c_0"), states, strict=False))
            for name, value in values.items():
                found[name] = ops.convert_to_numpy(ops.cast(value, dtype))
        elif record:
            ops.convert_to_numpy(sequences[:1, :1])
    except Exception:  # of any type, depending on the backend
        raise ValueError(
            f"`layer` must be called outside of compiled or vectorized code. "
            f"Received: {lstm.name!r}. Pass this layer and its own inputs instead."
        ) from None
    return found


def observed_arrays(lstm):
    """Return the names of the arrays that `maps` may change, after a `run`."""
    loop = _loop_of(lstm)
    return [name for name in loop.arrays if name not in loop.unobserved]


def result_dtype(lstm):
    """Return the dtype of the recorded arrays of a layer."""
    return "float64" if lstm.cell.compute_dtype == "float64" else "float32"


def _check_observed(lstm, loop, changes):
    for name in sorted(loop.unobserved.intersection(changes)):
        raise ValueError(
            f"{name!r} must pass through `observe` in the cell, so that it can be "
            f"changed. Received: {lstm.name!r} with a {type(lstm.cell).__name__!r}"
        )


def _check_called(model, lstm, count, call_index):
    if not count:
        raise ValueError(
            f"`layer` must be called in the model's forward pass. Received: "
            f"{lstm.name!r}, which {model.name!r} does not call, or only in compiled "
            "code"
        )
    if call_index >= count:
        raise ValueError(
            f"`call_index` must be less than {count}, how often {model.name!r} calls "
            f"{lstm.name!r}. Received: call_index={call_index}"
        )


@contextlib.contextmanager
def _keep_errors(errors):
    try:
        yield
    except Exception as error:
        errors.append(error)
        raise


def values_of(model):
    """Return the values of the variables; on torch, without their gradients."""
    return [ops.stop_gradient(v.value) for v in model.variables]


@contextlib.contextmanager
def _frozen(model, values=None):
    """Discard updates of states; on torch, also the gradients of variables."""
    values = values_of(model) if values is None else values
    try:
        with keras.StatelessScope(list(zip(model.variables, values, strict=True))):
            yield
    except BaseException:
        # The cells keep the dropout masks of a call that ends in an error.
        for layer in _keras.all_layers(model):
            if isinstance(layer, _keras.DropoutRNNCell):
                layer.reset_dropout_mask()
                layer.reset_recurrent_dropout_mask()
        raise


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
