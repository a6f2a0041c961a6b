"""Convert between `ScratchLSTM` and `torch.nn.LSTM`."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_scratch_lstm import _validation
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.per_gate import FUSED_ORDER

# Names and order of the gates are those of `torch.nn.LSTM`; the gates lie one
# below the other there, in the built-in cell's order.
_TORCH_WEIGHTS = ("weight_ih_l0", "weight_hh_l0")
_TORCH_BIASES = ("bias_ih_l0", "bias_hh_l0")


def from_torch(state_dict: Mapping[str, Any], **arguments: Any) -> ScratchLSTM:
    """A `ScratchLSTM` with the weights of a `torch.nn.LSTM`.

    torch's two biases are added up, since the equations have one.

    Args:
        state_dict: Dict of arrays or CPU tensors, as `torch.nn.LSTM.state_dict()`
            returns it, of one layer in one direction without `proj_size`:
            `weight_ih_l0` of shape `(4 * units, features)`, `weight_hh_l0` of
            shape `(4 * units, units)`, and, unless there is no bias, `bias_ih_l0`
            and `bias_hh_l0` of shape `(4 * units,)`.
        **arguments: Arguments of `ScratchLSTM`. torch returns all that
            `return_sequences=True` and `return_state=True` ask for, and has the
            time first, as with `time_major=True`, unless `batch_first` is set.

    Returns:
        A built `ScratchLSTM`.

    Raises:
        ValueError: `state_dict` has other keys or shapes; the message names
            the first.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm.convert import from_torch
    >>> weights = {"weight_ih_l0": np.ones((16, 8)), "weight_hh_l0": np.ones((16, 4))}
    >>> layer = from_torch(weights, return_sequences=True)
    >>> layer.units, tuple(layer.cell.W_xi.shape)
    (4, (8, 4))

    Reference:

    - [torch.nn.LSTM](
        https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html),
        the names, the shapes and the order of the gates
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"`state_dict` is {state_dict!r}; expected a dict, as `state_dict()` of a "
            "`torch.nn.LSTM` returns it."
        )
    for name in ("units", "use_bias", "cell"):
        if name in arguments:
            raise _validation.invalid(
                name, arguments[name], "it to be left out, since `state_dict` says it"
            )
    values = {
        key: np.asarray(
            _validation.numbers_only(
                f"state_dict[{key!r}]", value, "an array of numbers"
            )
        )
        for key, value in state_dict.items()
    }
    use_bias = any(name in values for name in _TORCH_BIASES)
    names = _TORCH_WEIGHTS + (_TORCH_BIASES if use_bias else ())
    if set(values) != set(names):
        raise ValueError(
            f"`state_dict` has the keys {', '.join(map(repr, values))}; expected "
            f"{', '.join(map(repr, names))}, which is one layer in one direction "
            "without `proj_size`."
        )
    W_x = values["weight_ih_l0"]
    rows, features = (*W_x.shape, 0, 0)[:2]
    units = rows // 4
    shapes = [(4 * units, features), (4 * units, units), (4 * units,), (4 * units,)]
    for name, shape in zip(names, shapes, strict=False):
        if values[name].shape != shape or not units:
            raise ValueError(
                f"`state_dict` has {name} of shape {values[name].shape}; expected "
                f"{shape}, for {units} units and {features} features."
            )
    layer = ScratchLSTM(units, use_bias=use_bias, **arguments)
    layer.build((None, None, features))
    fused = [W_x, values["weight_hh_l0"]]
    if use_bias:
        fused.append(values["bias_ih_l0"] + values["bias_hh_l0"])
    for letter, value in zip(("W_x", "W_h", "b_"), fused, strict=False):
        for gate, part in zip(FUSED_ORDER, np.split(value, 4), strict=True):
            getattr(layer.cell, letter + gate).assign(part.T)
    return layer


def to_torch(layer: ScratchLSTM) -> dict[str, np.ndarray]:
    """The weights of a `ScratchLSTM`, as a `torch.nn.LSTM` has them.

    The inverse of `from_torch`. The bias is in `bias_ih_l0`; `bias_hh_l0` is
    zeros.

    Args:
        layer: A built `ScratchLSTM`, with the usual activations and gates, that
            reads forwards.

    Returns:
        Dict of NumPy arrays, with the keys that `from_torch` expects.

    Raises:
        ValueError: `torch.nn.LSTM` does not do what `layer` does.

    Example:

    >>> from keras_scratch_lstm import ScratchLSTM
    >>> from keras_scratch_lstm.convert import to_torch
    >>> layer = ScratchLSTM(4)
    >>> layer.build((None, 10, 8))
    >>> to_torch(layer)["weight_ih_l0"].shape
    (16, 8)

    It goes into torch by
    `lstm.load_state_dict({k: torch.tensor(v) for k, v in to_torch(layer).items()})`.
    """
    if not isinstance(layer, ScratchLSTM):
        raise ValueError(f"`layer` is {layer!r}; expected a `ScratchLSTM`.")
    cell = layer.cell
    for fits, expected in (
        (type(layer) is ScratchLSTM, "a ScratchLSTM itself, not of a subclass"),
        (type(cell) is ScratchLSTMCell, "a ScratchLSTMCell itself, not of a subclass"),
        (cell.built, "a layer that is built"),
        (not layer.go_backwards, "a layer that reads forwards"),
        (cell.activation is keras.activations.tanh, "tanh as `activation`"),
        (
            cell.recurrent_activation is keras.activations.sigmoid,
            "sigmoid as `recurrent_activation`",
        ),
    ):
        if not fits:
            raise ValueError(
                f"`{layer.name}` is not what `torch.nn.LSTM` computes; expected "
                f"{expected}."
            )

    def stacked(letter):
        weights = [
            keras.ops.convert_to_numpy(getattr(cell, letter + gate))
            for gate in FUSED_ORDER
        ]
        return np.concatenate([weight.T for weight in weights])

    result = {"weight_ih_l0": stacked("W_x"), "weight_hh_l0": stacked("W_h")}
    if cell.use_bias:
        result["bias_ih_l0"] = stacked("b_")
        result["bias_hh_l0"] = np.zeros_like(result["bias_ih_l0"])
    return result
