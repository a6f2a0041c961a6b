"""The gates of a trained LSTM, step by step."""

import contextlib
import inspect
import os
import secrets
import threading
import weakref
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _types, checks, recurrence
from keras_scratch_lstm.by_gate import FUSED_ORDER, GATES
from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM

if TYPE_CHECKING:
    import pandas

ARRAYS = ("i", "f", "o", "c_tilde", "c", "h")
SATURATED = 0.1, 0.9  # below, above
_FORMAT = "keras_scratch_lstm.GateTrace 1"
_DTYPES = np.dtype("float32"), np.dtype("float64")

# Numbers an array may have for the steps that are computed at once: 4 MB.
_NUMBERS_AT_ONCE = 2**20


class Saturation(NamedTuple):
    """Shares of steps, each `(units,)`: below 0.1, and above 0.9."""

    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class GateTrace:
    """What went on in an LSTM: its gates and states at every step.

    `trace_gates` makes it. The letters are those of the equations in
    `ScratchLSTMCell`; step `t` is that of the input, whatever the direction in
    which the layer reads. At a masked step, which the layer skips, all six
    arrays are NaN.

    Attributes:
        i: Array of shape `(batch, time, units)`, the input gate. Float32, or
            float64 for a layer that computes in it, as are all six.
        f: The forget gate, of the same shape.
        o: The output gate, of the same shape.
        c_tilde: The candidate memory, of the same shape.
        c: The memory after the step, of the same shape.
        h: The hidden state after the step, of the same shape: the output.
        mask: Boolean array of shape `(batch, time)`, false where a step is
            masked, or `None` where there was no mask.
        layer: String, the layer's name.
        backward: In a trace of `Bidirectional`, the other direction's
            `GateTrace`, else `None`.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import GateTrace, trace_gates
    >>> layer = keras.layers.LSTM(4, name="lstm")
    >>> x = np.ones((2, 3, 5), "float32")
    >>> h = layer(x)
    >>> trace = trace_gates(layer, x)
    >>> trace
    GateTrace(layer='lstm', batch=2, time=3, units=4)
    >>> np.allclose(trace.h, trace.o * np.tanh(trace.c))
    True
    >>> trace.saturation()["f"].right.shape
    (4,)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trace.save(f"{folder}/trace.npz")
    ...     again = GateTrace.load(f"{folder}/trace.npz")
    >>> np.array_equal(again.f, trace.f)
    True
    """

    i: np.ndarray
    f: np.ndarray
    o: np.ndarray
    c_tilde: np.ndarray
    c: np.ndarray
    h: np.ndarray
    mask: np.ndarray | None = None
    layer: str = ""
    backward: "GateTrace | None" = None

    def __post_init__(self) -> None:
        for name in ARRAYS:
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype not in _DTYPES:
                raise checks.wrong(name, array, "an array of float32 or float64")
            if array.ndim != 3 or array.shape != self.i.shape:
                raise ValueError(
                    f"`{name}` has the shape {array.shape}; expected (batch, time, "
                    "units), the same for all six."
                )
        mask, of_mask = self.mask, self.i.shape[:2]
        is_mask = isinstance(mask, np.ndarray) and mask.dtype == bool
        if mask is not None and not (is_mask and mask.shape == of_mask):
            raise checks.wrong(
                "mask", mask, f"a Boolean array of shape {of_mask}, or None"
            )
        if not isinstance(self.layer, str):
            raise checks.wrong("layer", self.layer, "a string")
        backward = self.backward
        is_trace = isinstance(backward, GateTrace) and backward.backward is None
        if backward is not None and not is_trace:
            raise checks.wrong(
                "backward", backward, "a `GateTrace` without `backward`, or None"
            )

    def saturation(self) -> dict[str, Saturation]:
        """How often each gate of each unit is nearly shut, or nearly open.

        The left- and right-saturated fractions of Karpathy, Johnson and Li:
        the shares of steps at which a gate is below 0.1, and above 0.9. Masked
        steps do not count.

        Returns:
            Dict with the keys `"i"`, `"f"` and `"o"`, and for each a
            `Saturation(left, right)` of two arrays of shape `(units,)`.

        Reference:

        - [Karpathy, Johnson and Li, 2015](https://arxiv.org/abs/1506.02078)
        """
        low, high = SATURATED
        if self.mask is None:
            steps = self.i.shape[0] * self.i.shape[1]
        else:
            steps = np.count_nonzero(self.mask)

        def share(condition):
            # With nothing but masked steps, there is no share to tell.
            count = np.count_nonzero(condition, axis=(0, 1))
            return count / steps if steps else np.full(count.shape, np.nan)

        return {
            gate: Saturation(share(values < low), share(values > high))
            for gate, values in (("i", self.i), ("f", self.f), ("o", self.o))
        }

    def to_dataframe(
        self, tokens: Sequence[_types.Tokens] | None = None
    ) -> "pandas.DataFrame":
        """One row for each number, as a pandas `DataFrame`.

        Args:
            tokens: For each sample, its tokens: a string, or a list of `time`
                strings. Default: `None`.

        Returns:
            `DataFrame` with the columns `sample`, `step`, `token`, `unit`,
            `gate` (one of `i`, `f`, `o`, `c_tilde`, `c` and `h`) and `value`.
            Without `tokens`, the column `token` is empty.

        Raises:
            ImportError: pandas is not installed.
            ValueError: `tokens` does not fit.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError(
                "`to_dataframe` needs pandas: run `pip install pandas`."
            ) from None
        batch, time, units = self.i.shape
        if tokens is not None:
            try:
                tokens = list(tokens)
            except TypeError:
                raise checks.wrong(
                    "tokens", tokens, f"the tokens of {batch} samples"
                ) from None
            if len(tokens) != batch:
                raise ValueError(
                    f"`tokens` has {len(tokens)} samples; expected {batch}, each with "
                    f"its {time} tokens."
                )
            tokens = [token for own in tokens for token in check_tokens(own, time)]
        sample, step, unit, gate = np.indices(
            (batch, time, units, len(ARRAYS)), dtype="int32", sparse=True
        )
        shape = batch, time, units, len(ARRAYS)

        def column(index):
            return np.broadcast_to(index, shape).ravel()

        position = column(sample * time + step)
        categories = list(dict.fromkeys(tokens or []))
        code_of = {token: code for code, token in enumerate(categories)}
        codes = np.array([code_of[token] for token in tokens or []], "int32")
        return pd.DataFrame(
            {
                "sample": column(sample),
                "step": column(step),
                "token": pd.Categorical.from_codes(
                    np.full(position.shape, -1) if tokens is None else codes[position],
                    categories=pd.Index(categories, dtype="str"),
                ),
                "unit": column(unit),
                "gate": pd.Categorical.from_codes(column(gate), categories=ARRAYS),
                "value": np.stack([getattr(self, name) for name in ARRAYS], -1).ravel(),
            }
        )

    def to_html(
        self, path: _types.Path, tokens: _types.Tokens, sample: int = 0
    ) -> None:
        """Writes a page on which to look at the gates over the text.

        One file that needs no network: pick a gate and a unit, and the text is
        coloured by its values; point at a token for the numbers; sort the units
        by what they follow. So that 2,000 tokens of 256 units take less than
        3 MB, each unit's values are rounded, to 254 steps between its least and
        its greatest if they fit, else to fewer, down to 31; the page says to how
        many.

        Args:
            path: Where to write it.
            tokens: The sample's tokens: a string, or a list of `time` strings.
            sample: Integer, which sample of the batch. Default: 0.

        Raises:
            ImportError: Jinja2 is not installed.
            ValueError: `tokens` or `sample` does not fit.
        """
        from keras_scratch_lstm.page import render

        page = render(self, tokens, sample).encode("utf-8", "replace")
        _write_whole(path, lambda file: file.write(page))

    def save(self, path: _types.Path) -> None:
        """Writes the trace to an `.npz` file, whole or not at all.

        Args:
            path: Where to write it; `np.load` reads it, too.

        Raises:
            OSError: The file can't be written.
        """
        content = {"format": np.array(_FORMAT), **self._to_arrays("")}
        _write_whole(path, lambda file: np.savez(file, **content))

    @classmethod
    def load(cls, path: _types.Path) -> "GateTrace":
        """Reads a trace that `save` has written; nothing in it is ever run.

        Args:
            path: Where it is.

        Returns:
            A `GateTrace` with the same arrays.

        Raises:
            OSError: The file can't be read.
            ValueError: It is damaged, or no gate trace.
        """
        path = checks.path("path", path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            # To open a pipe is to wait for whoever writes to it.
            raise checks.wrong("path", str(path), "a file")
        with open(path, "rb") as file:
            try:
                return cls._from_arrays(_read_arrays(file), "")
            except _SIGNS_OF_DAMAGE as error:
                raise ValueError(
                    f"`path` is {str(path)!r}, which is damaged or no gate trace "
                    f"({type(error).__name__}); expected a file of `GateTrace.save`."
                ) from None

    def __repr__(self) -> str:
        batch, time, units = self.i.shape
        return (
            f"GateTrace(layer={self.layer!r}, batch={batch}, time={time}, "
            f"units={units}{', masked' if self.mask is not None else ''}"
            f"{', backward=…' if self.backward is not None else ''})"
        )

    def _to_arrays(self, prefix):
        arrays = {prefix + name: getattr(self, name) for name in ARRAYS}
        arrays[prefix + "layer"] = np.array(self.layer)
        if self.mask is not None:
            arrays[prefix + "mask"] = self.mask
        if self.backward is not None:
            arrays |= self.backward._to_arrays("backward_")
        return arrays

    @classmethod
    def _from_arrays(cls, content, prefix):
        arrays = {name: content[prefix + name] for name in ARRAYS}
        mask = content.get(prefix + "mask")
        backward = None
        if not prefix and "backward_i" in content:
            backward = cls._from_arrays(content, "backward_")
        layer = content[prefix + "layer"]
        if getattr(layer, "shape", None) != () or layer.dtype.kind != "U":
            raise ValueError("layer")
        layer = str(layer)
        return cls(**arrays, mask=mask, layer=layer, backward=backward)


def trace_gates(
    model_or_layer: Any, inputs: Any, layer: Any = None, batch_size: int = 32
) -> GateTrace:
    """The gates and states of an LSTM, for every unit at every step.

    It works for models that are trained already: nothing is changed and
    nothing retrained. The layer may be a `ScratchLSTM`, a
    `keras.layers.LSTM`, or a `keras.layers.RNN` over a `ScratchLSTMCell` or a
    `keras.layers.LSTMCell`; its cell may be of a subclass of `ScratchLSTMCell`
    with gates of its own. It may stand alone, or in a Sequential, Functional,
    nested or subclassed model, and it may be wrapped in
    `keras.layers.Bidirectional`.

    The model runs up to the traced layer, in inference mode: nothing is
    dropped out. A stateful layer is traced from the states that it has, and
    keeps them, as do all others. Where a model calls the layer several times,
    it is the first call that is traced.

    Long inputs are computed `batch_size` samples and some hundred to thousand
    steps at a time, so that on the way there, no more than that is held beside
    the result. (But the layers before the traced one see all steps of a batch.)

    Args:
        model_or_layer: A Keras model, or the layer itself; built.
        inputs: What the model or layer takes: an array or tensor, or a list or
            dict of some, the samples first. (For a `time_major` layer itself,
            the time first.)
        layer: The layer's name, or the layer, where the model has several. Of
            a `Bidirectional`, the name or one of its two layers may be given.
            Default: `None`.
        batch_size: Positive integer, how many samples to run at a time. A
            model with stateful or `time_major` layers runs all of them
            together. Default: 32.

    Returns:
        A `GateTrace`: `i`, `f`, `o`, `c_tilde`, `c` and `h`, each an array of
        shape `(batch, time, units)`, for all samples, the steps in the order of
        the input. For `Bidirectional`, it is that of the forward layer, and
        its `backward` is that of the other.

    Raises:
        ValueError: There is no LSTM to trace, or no telling which, or the
            inputs do not fit; the message names the candidates.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import trace_gates
    >>> model = keras.Sequential([
    ...     keras.Input((None,), dtype="int32"),
    ...     keras.layers.Embedding(28, 8),
    ...     keras.layers.LSTM(16, name="lstm"),
    ...     keras.layers.Dense(28),
    ... ])
    >>> trace = trace_gates(model, np.array([[3, 1, 4, 1, 5]]))
    >>> trace.f.shape
    (1, 5, 16)
    """
    target, lstms = find_lstms(model_or_layer, layer)
    for part in (model_or_layer, *(lstm.cell for lstm in lstms)):
        if not part.built:
            raise ValueError(
                f"`model_or_layer` is {model_or_layer.name!r}, which is not built yet; "
                "expected one that has its weights."
            )
    arrays: dict[Any, dict[str, np.ndarray]] = {lstm: {} for lstm in lstms}
    for first, size, samples, calls in _calls(
        model_or_layer, target, inputs, batch_size
    ):
        for lstm, whole in arrays.items():
            part = _run(lstm, **calls[lstm])
            rows, time = part["h"].shape[:2]
            if size == samples:
                arrays[lstm] = part
                continue
            # A model that folds an axis into the batch has several rows a sample.
            fold = rows // size
            if rows != fold * size or time != whole.get("h", part["h"]).shape[1]:
                raise ValueError(
                    f"`inputs` reach {target.name!r} with a number of steps that "
                    "changes from batch to batch; expected a `batch_size` that takes "
                    "all at once."
                )
            _put(whole, part, 0, first * fold, samples * fold)
    trace: Any = None
    for lstm, whole in reversed(arrays.items()):
        trace = GateTrace(**whole, layer=lstm.name, backward=trace)
    return trace


def check_tokens(tokens, time):
    """The tokens of one sample as a list of strings, one a step."""
    try:
        tokens = [str(token) for token in tokens]
    except TypeError:
        raise ValueError(
            f"`tokens` is {tokens!r}; expected a string or a list of {time} strings."
        ) from None
    if len(tokens) != time:
        raise ValueError(
            f"`tokens` has {len(tokens)} tokens; expected {time}, one for each step."
        )
    return tokens


def check_sample(trace, sample):
    """The index of one of the trace's samples."""
    samples = len(trace.i)
    return checks.index("sample", sample, samples)


def weights_by_letter(cell):
    """A cell's weights, under the letters of the equations.

    Args:
        cell: A built `ScratchLSTMCell` or `keras.layers.LSTMCell`.

    Returns:
        List of pairs, name and tensor, in the order of `ScratchLSTMCell.weights`.
    """
    if isinstance(cell, ScratchLSTMCell):
        return [(weight.name, weight.value) for weight in cell.weights]
    fused = {"W_x": cell.kernel, "W_h": cell.recurrent_kernel, "b_": cell.bias}
    split = {
        letter: dict(zip(FUSED_ORDER, ops.split(values.value, 4, axis=-1), strict=True))
        for letter, values in fused.items()
        if values is not None
    }
    return [
        (letter + gate, parts[gate])
        for gate in GATES
        for letter, parts in split.items()
    ]


# --- which layer -------------------------------------------------------------


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
    choices = {target: _directions(target) for target in targets}
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
            for direction in _directions(target):
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
    directions = _directions(layer)
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


def _directions(layer):
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


def _calls(model, target, inputs, batch_size):
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
    batch_size = checks.positive_integer("batch_size", batch_size)
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
    if 0 in sequences.shape or not checks.are_numbers(sequences):
        raise ValueError(
            f"`inputs` reach {target.name!r} as {checks.dtype_of(sequences)} of shape "
            f"{sequences.shape}; expected real numbers, and at least one step."
        )
    given = [] if initial_state is None else keras.tree.flatten(initial_state)
    calls = {}
    for index, layer in enumerate(_directions(target)):
        time_major = getattr(layer, "time_major", False)
        if given:
            h, c = given[2 * index : 2 * index + 2]
        elif layer.stateful:
            h, c = layer.states
        else:
            h, c = layer.get_initial_state(sequences.shape[1 if time_major else 0])
        dtype = _dtype_of_results(layer)
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


# --- the recurrence ----------------------------------------------------------


def _run(layer, sequences, h, c, mask=None):
    """Runs one LSTM over a batch; its arrays by name."""
    if layer.go_backwards:
        sequences = np.flip(sequences, 1)
        mask = None if mask is None else np.flip(mask, 1)
    weights = [value for _, value in weights_by_letter(layer.cell)]
    run = _recurrence(layer).predict_on_batch
    time, arrays = sequences.shape[1], {}
    steps = max(1, _NUMBERS_AT_ONCE // h.size)
    for start in range(0, time, steps):
        now = slice(start, start + steps)
        inputs = {"weights": weights, "sequences": sequences[:, now], "h": h, "c": c}
        if mask is not None:
            inputs["mask"] = mask[:, now]
        outputs = run(inputs)
        states = outputs.pop("states")
        if "all_six" in outputs:
            six = np.split(outputs["all_six"], len(ARRAYS), axis=-1)
            outputs = dict(zip(ARRAYS, six, strict=True))
        else:
            outputs["c"] = _memory(c, **outputs, mask=inputs.get("mask"))
        _put(arrays, outputs, 1, start, time)
        h, c = states
    if mask is not None:
        for values in arrays.values():
            values[~mask] = np.nan
        arrays["mask"] = mask
    if layer.go_backwards:
        arrays = {name: np.flip(values, 1) for name, values in arrays.items()}
    return arrays


def _put(whole, part, axis, start, size):
    """Puts a part's arrays into the whole ones, which the first part makes."""
    for name, values in part.items():
        if values.shape[axis] == size:
            whole[name] = values
            continue
        if name not in whole:
            shape = (*values.shape[:axis], size, *values.shape[axis + 1 :])
            whole[name] = np.empty(shape, values.dtype)
        stop = start + values.shape[axis]
        whole[name][(slice(None),) * axis + (slice(start, stop),)] = values


def _memory(c, i, f, c_tilde, mask, **_):
    """c of all steps, from the gates."""
    memory = np.empty_like(f)
    for t in range(f.shape[1]):
        new = f[:, t] * c + i[:, t] * c_tilde[:, t]
        c = new if mask is None else np.where(mask[:, t, None], new, c)
        memory[:, t] = c
    return memory


class _Function(keras.Model):
    """A function of nested tensors, to be run by `predict_on_batch`.

    So Keras compiles it where the backend compiles, and records no gradients.
    It has a model's form, since Keras does this for models alone. But it has no
    weights; they are among the inputs, so that it can run in several threads:
    on JAX, variables of a model are out of use while it predicts.
    """

    def __init__(self, function, dtype):
        super().__init__(name="function", dtype=dtype)
        self._function = function
        self.built = True

    def call(self, inputs):
        return self._function(inputs)


_RECURRENCES: Any = weakref.WeakKeyDictionary()


def _recurrence(layer):
    """The compiled recurrence of a layer, the same one at each call."""
    with _LOCK:
        if layer not in _RECURRENCES:
            _RECURRENCES[layer] = _make_recurrence(layer)
        return _RECURRENCES[layer]


def _make_recurrence(layer):
    cell = layer.cell
    if not isinstance(cell, ScratchLSTMCell):
        cell = _same_cell(cell)
    make = _fused if _has_kernel(cell) else _step_by_step
    rnn, run = make(cell)
    dtype = _dtype_of_results(layer)

    def with_weights(inputs):
        values = zip(cell.weights, inputs["weights"], strict=True)
        with keras.StatelessScope(values):
            results = run(*(inputs.get(key) for key in ("sequences", "h", "c", "mask")))
        return keras.tree.map_structure(lambda x: ops.cast(x, dtype), results)

    function = _Function(with_weights, dtype=cell.dtype_policy)
    function.supports_jit = rnn.supports_jit
    return function


def _has_kernel(cell):
    """Whether the layer may run in a kernel that keeps the gates to itself."""
    plain = (
        type(cell).gates is ScratchLSTMCell.gates
        and type(cell).call is ScratchLSTMCell.call
        # Elsewhere, c is rounded at each step, which cannot be told from outside.
        and cell.compute_dtype in ("float32", "float64")
    )
    return plain and not {"torch", "cudnn"}.isdisjoint(recurrence.ways())


def _fused(cell):
    """h from the layer itself; the gates from h, all steps in one product.

    c is left to `_memory`: here no gate looks at it.
    """
    rnn = ScratchLSTM(
        cell=cell,
        return_sequences=True,
        return_state=True,
        name="recurrence",
        dtype=cell.dtype_policy,
    )

    def run(x, h_0, c_0, mask):
        h, *states = rnn(x, initial_state=[h_0, c_0], mask=mask)
        before = _one_step_before(h, h_0, mask)
        x, before = (ops.reshape(v, (-1, v.shape[-1])) for v in (x, before))
        gates = cell.gates(x, before, None)
        gates = [ops.reshape(values, ops.shape(h)) for values in gates]
        return {**Gates(*gates)._asdict(), "h": h, "states": states}

    return rnn, run


def _one_step_before(h, h_0, mask):
    """The h that each step starts from."""
    h_0 = ops.expand_dims(h_0, 1)
    before = ops.concatenate([h_0, h[:, :-1]], axis=1)
    if mask is None:
        return before
    # Until the first step that counts, Keras puts out zeros and keeps the state.
    counts = ops.cast(mask, "int32")
    seen = ops.cumsum(counts, axis=1) - counts > 0
    return ops.where(ops.expand_dims(seen, -1), before, h_0)


def _step_by_step(cell):
    """All six from Keras's own loop."""
    rnn = keras.layers.RNN(
        _AllSix(cell),
        return_sequences=True,
        return_state=True,
        name="recurrence",
        dtype=cell.dtype_policy,
    )

    def run(x, h_0, c_0, mask):
        gates = [ops.zeros_like(h_0)] * len(Gates._fields)
        before = ops.concatenate([*gates, c_0, h_0], axis=-1)
        all_six, state = rnn(x, initial_state=[before], mask=mask)
        *_, c, h = ops.split(state, len(ARRAYS), axis=-1)
        return {"all_six": all_six, "states": [h, c]}

    return rnn, run


class _AllSix(keras.layers.Layer):
    """A cell whose output is all six arrays side by side.

    They are its state as well, though it needs no more than h and c: where there
    is a mask, Keras on JAX takes the first state for the last output.
    """

    def __init__(self, cell):
        super().__init__(name="all_six", dtype=cell.dtype_policy)
        self.cell = cell
        self.state_size = [len(ARRAYS) * cell.units]
        self.output_size = len(ARRAYS) * cell.units
        self.built = True

    def call(self, inputs, states):
        *_, c, h = ops.split(states[0], len(ARRAYS), axis=-1)
        i, f, o, c_tilde = self.cell.gates(inputs, h, c)
        if type(self.cell).call is ScratchLSTMCell.call:
            # What the cell does; to ask it would be to compute the gates twice.
            c = f * c + i * c_tilde
            h = o * self.cell.activation(c)
        else:
            _, (h, c) = self.cell(inputs, [h, c])
        all_six = ops.concatenate([i, f, o, c_tilde, c, h], axis=-1)
        return all_six, [all_six]


def _same_cell(cell):
    """A `ScratchLSTMCell` for a built-in cell; its weights are yet to be given."""
    same = ScratchLSTMCell(
        cell.units,
        activation=cell.activation,
        recurrent_activation=cell.recurrent_activation,
        use_bias=cell.use_bias,
        kernel_initializer="zeros",
        recurrent_initializer="zeros",
        seed=0,
        dtype=cell.dtype_policy,
        name="cell",
    )
    same.build((None, cell.kernel.shape[0]))
    return same


def _dtype_of_results(layer):
    return "float64" if layer.cell.compute_dtype == "float64" else "float32"


# --- files -------------------------------------------------------------------

# What NumPy and `zipfile` raise over files that are none of theirs.
_SIGNS_OF_DAMAGE = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def _read_arrays(file):
    """The arrays of a saved trace by name. Nothing is unpickled or unpacked."""
    if not zipfile.is_zipfile(file):
        raise ValueError("one array, or none")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    arrays = np.load(file, allow_pickle=False)
    members = arrays.zip.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("compressed, which `save` does not do")
    if sum(member.file_size for member in members) > size:
        raise ValueError("longer than the file")
    if str(arrays["format"]) != _FORMAT:
        raise ValueError("format")
    return {name: arrays[name] for name in arrays.files}


def _write_whole(path, write):
    """Writes a file whole or not at all."""
    path = checks.path("path", path)
    part = path.parent / f"{path.name}.{secrets.token_hex(4)}"
    with contextlib.ExitStack() as undo:
        with open(part, "xb") as file:
            undo.callback(os.unlink, part)
            write(file)
        os.replace(part, path)
        undo.pop_all()
