"""`GateTrace`: the gates and states of an LSTM at every time step."""

import contextlib
import os
import secrets
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from keras_scratch_lstm import _types, _validation
from keras_scratch_lstm.tracing.tokens import token_features, tokens_of_sample

if TYPE_CHECKING:
    import pandas

ARRAYS = ("i", "f", "o", "c_tilde", "c", "h")
SATURATED = 0.1, 0.9  # below, above
_FORMAT = "keras_scratch_lstm.GateTrace 1"
_DTYPES = np.dtype("float32"), np.dtype("float64")


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
                raise _validation.invalid(name, array, "an array of float32 or float64")
            if array.ndim != 3 or array.shape != self.i.shape:
                raise ValueError(
                    f"`{name}` has the shape {array.shape}; expected (batch, time, "
                    "units), the same for all six."
                )
        mask, of_mask = self.mask, self.i.shape[:2]
        is_mask = isinstance(mask, np.ndarray) and mask.dtype == bool
        if mask is not None and not (is_mask and mask.shape == of_mask):
            raise _validation.invalid(
                "mask", mask, f"a Boolean array of shape {of_mask}, or None"
            )
        if not isinstance(self.layer, str):
            raise _validation.invalid("layer", self.layer, "a string")
        backward = self.backward
        is_trace = isinstance(backward, GateTrace) and backward.backward is None
        if backward is not None and not is_trace:
            raise _validation.invalid(
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
                raise _validation.invalid(
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

    def correlate(
        self, features: Mapping[str, np.ndarray], array: str = "c"
    ) -> dict[str, np.ndarray]:
        """Correlate features of the time steps with the values of each unit.

        Args:
            features: Dict of feature name -> array of shape `(time,)` or
                `(batch, time)`, of booleans or numbers.
            array: String, the gate or state to correlate. Defaults to `"c"`.

        Returns:
            Dict of feature name -> float64 array of shape `(units,)`: the Pearson
            correlation over the unmasked time steps, NaN where a feature or a unit is
            constant.
        """
        if array not in ARRAYS:
            raise _validation.invalid("array", array, f"one of {str(ARRAYS)[1:-1]}")
        shape = self.i.shape[:2]
        mask = np.ones(shape, bool) if self.mask is None else self.mask

        def center(x):
            # Relative to the first value, constants are exactly zero.
            x = (x - x[:1]).astype("float64")
            return x - x.sum(axis=0) / max(len(x), 1)

        correlations = {}
        with np.errstate(invalid="ignore"):  # infinite values
            x = center(getattr(self, array)[mask])
            for name, feature in features.items():
                feature = np.asarray(feature, "float64")
                if feature.shape not in (shape, shape[1:]):
                    rule = f"arrays of shape {shape[1:]} or {shape}"
                    raise _validation.invalid("features", feature, rule)
                y = center(np.broadcast_to(feature, shape)[mask])
                norms = np.sqrt((x**2).sum(axis=0) * (y**2).sum())
                correlations[name] = y @ x / np.where(norms > 0, norms, np.nan)
        return correlations

    def to_html(
        self,
        path: _types.Path,
        tokens: _types.Tokens | None = None,
        sample: int = 0,
    ) -> None:
        """Write an HTML report of one sample's gates and states.

        The report is one file that needs no network. It colors the tokens by the
        values of a unit, draws these as a line chart, and sorts the units by
        variance or by their correlation with features of the tokens. Values are
        quantized, to 254 levels or fewer per unit, so that 2,000 tokens of 256 units
        take less than 3 MB.

        Args:
            path: String or path-like, the file to write.
            tokens: One sample's tokens (a string or a list of `time` strings), or a
                list of all samples' tokens. Defaults to `None`, which shows the
                numbers of the time steps.
            sample: Integer, the sample to report on. Defaults to `0`.

        Raises:
            ValueError: If `tokens` or `sample` is invalid.
        """
        from keras_scratch_lstm.tracing import html

        batch, time, _ = self.i.shape
        sample = check_sample(self, sample)
        if tokens is not None:
            tokens = tokens_of_sample(tokens, batch, time, sample)
        arrays = {name: getattr(self, name)[sample] for name in ARRAYS}
        mask = None if self.mask is None else self.mask[sample : sample + 1]
        one = GateTrace(**{k: v[None] for k, v in arrays.items()}, mask=mask)
        features = token_features(tokens or [])
        correlations = {name: one.correlate(features, name) for name in ARRAYS}
        page = html.render(self.layer, arrays, tokens, correlations).encode()
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
        path = _validation.path("path", path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            # To open a pipe is to wait for whoever writes to it.
            raise _validation.invalid("path", str(path), "a file")
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
    return _validation.index("sample", sample, samples)


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
    path = _validation.path("path", path)
    part = path.parent / f"{path.name}.{secrets.token_hex(4)}"
    with contextlib.ExitStack() as undo:
        with open(part, "xb") as file:
            undo.callback(os.unlink, part)
            write(file)
        os.replace(part, path)
        undo.pop_all()
