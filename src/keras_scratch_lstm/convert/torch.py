"""Conversion between `ScratchLSTM` and `torch.nn.LSTM`."""

import itertools
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm._validation import are_numbers, invalid
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES, fuse, named_weights

_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def from_torch(lstm_or_state_dict: Any, **arguments: Any) -> Any:
    """Convert a `torch.nn.LSTM` to `ScratchLSTM` layers with the same weights.

    torch's two biases are added, since the equations have one. Its dropout between
    layers is not converted; insert `keras.layers.Dropout` between the layers instead.

    Args:
        lstm_or_state_dict: A `torch.nn.LSTM` without `proj_size`, or its
            `state_dict()`, with tensors or arrays of any float dtype. It may be that
            of a module with one LSTM, whose weights have a prefix such as `"lstm."`.
        **arguments: Arguments of `ScratchLSTM`. In an LSTM of several layers,
            `return_sequences` and `return_state` apply to the last one.
            The outputs of torch are those of `return_sequences=True` and
            `return_state=True`, with `time_major=True` unless `batch_first` is set.

    Returns:
        A built `ScratchLSTM`, or, if the LSTM is bidirectional, a built
        `keras.layers.Bidirectional`. If it has several layers, a list of these, to
        be called one after the other. `Bidirectional(from_torch(lstm))` would lose
        the weights, as Keras re-creates the layer that is passed to it, and raises an
        error.

    Raises:
        ValueError: If the names or shapes of the weights are not those of a
            `torch.nn.LSTM`.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import from_torch
    >>> weights = {"weight_ih_l0": np.ones((16, 8)), "weight_hh_l0": np.ones((16, 4))}
    >>> layer = from_torch(weights, return_sequences=True)
    >>> layer.units, tuple(layer.cell.W_xi.shape)
    (4, (8, 4))
    """
    weights = _read(lstm_or_state_dict)
    suffixes = ("", "_reverse") if "weight_ih_l0_reverse" in weights else ("",)
    kinds = _KINDS[: 4 if "bias_ih_l0" in weights else 2]
    depth = sum(key.startswith("weight_ih") for key in weights) // len(suffixes)
    names = itertools.product(kinds, range(max(depth, 1)), suffixes)
    if weights.keys() != {f"{kind}_l{k}{suffix}" for kind, k, suffix in names}:
        rule = "a `torch.nn.LSTM` without `proj_size`, or its state dict"
        raise invalid("lstm_or_state_dict", list(weights), rule)
    layers = []
    for k in range(depth):
        options = dict(arguments)
        if k < depth - 1:
            options.update(return_sequences=True, return_state=False)
        if depth > 1 and "name" in options:
            options["name"] = f"{options['name']}_{k}"
        cells = [
            {kind: weights[f"{kind}_l{k}{suffix}"] for kind in kinds}
            for suffix in suffixes
        ]
        layers.append(_make_layer(cells, options))
    return layers if depth > 1 else layers[0]


def _read(lstm_or_state_dict):
    """The state dict, as float64 arrays."""
    weights = lstm_or_state_dict
    if hasattr(weights, "state_dict"):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        rule = "a `torch.nn.LSTM` or its state dict"
        raise invalid("lstm_or_state_dict", weights, rule)

    def read(key, value):
        if hasattr(value, "detach"):  # NumPy has no bfloat16, for one
            value = value.detach().cpu().double()
        value = np.asarray(value)
        if value.ndim not in (1, 2) or not are_numbers(value):
            name = f"lstm_or_state_dict[{key!r}]"
            raise invalid(name, value, "a matrix or vector of real numbers")
        return value.astype("float64")

    prefix = _prefix(weights)
    return {
        str(key).removeprefix(prefix): read(key, value)
        for key, value in weights.items()
        if str(key).startswith(prefix)
    }


def _prefix(weights):
    """What precedes the names of an LSTM that is a part of a module."""
    first = "weight_ih_l0"
    prefixes = [str(key)[: -len(first)] for key in weights if str(key).endswith(first)]
    if len(prefixes) > 1:
        rule = "the weights of one LSTM. Pass those of one prefix"
        raise invalid("lstm_or_state_dict", prefixes, rule)
    return prefixes[0] if prefixes else ""


def _make_layer(cells, options):
    """Make a built layer from one cell's weights, or from one per direction."""
    features, units = (cells[0][kind].shape[-1] for kind in _KINDS[:2])
    layer = ScratchLSTM(units, use_bias="bias_ih" in cells[0], **options)
    halves = [layer]
    if len(cells) == 2:
        layer = keras.layers.Bidirectional(
            layer, name=options.get("name"), dtype=options.get("dtype")
        )
        halves = [layer.forward_layer, layer.backward_layer]
    layer.build((None, None, features))
    shapes = [(4 * units, features), (4 * units, units), (4 * units,), (4 * units,)]
    for half, weights in zip(halves, cells, strict=True):
        for (kind, value), shape in zip(weights.items(), shapes, strict=False):
            if value.shape != shape:
                rule = f"of shape {shape}, for {units} units and {features} features"
                raise invalid(f"{kind}_l*", value, rule)
        W_x, W_h, *biases = weights.values()
        fused = {"W_x": W_x, "W_h": W_h} | ({"b_": sum(biases)} if biases else {})
        for prefix, values in fused.items():
            for gate, value in zip(FUSED_ORDER, np.split(values, 4), strict=True):
                getattr(half.cell, prefix + gate).assign(value.T)
        half._has_converted_weights = True
    return layer


def to_torch(layer: Any) -> dict[str, np.ndarray]:
    """Convert `ScratchLSTM` layers to the state dict of a `torch.nn.LSTM`.

    The inverse of `from_torch`. `bias_ih_l*` holds the bias; `bias_hh_l*` is zero.

    Args:
        layer: A built `ScratchLSTM` with the standard gates and activations, a
            `keras.layers.Bidirectional` of one, or a list of these for an LSTM of
            several layers.

    Returns:
        Dict of NumPy arrays, to be loaded with
        `lstm.load_state_dict({k: torch.tensor(v) for k, v in arrays.items()})`.

    Raises:
        ValueError: If `torch.nn.LSTM` does not compute what the layer computes.

    Example:

    >>> from keras_scratch_lstm import ScratchLSTM, to_torch
    >>> layer = ScratchLSTM(4)
    >>> layer.build((None, 10, 8))
    >>> to_torch(layer)["weight_ih_l0"].shape
    (16, 8)
    """
    state_dict = {}
    for k, one in enumerate(layer if isinstance(layer, (list, tuple)) else [layer]):
        halves = {"": one}
        if isinstance(one, keras.layers.Bidirectional):
            if one.merge_mode != "concat":
                raise invalid("merge_mode", one.merge_mode, "'concat', as in torch")
            halves = {"": one.forward_layer, "_reverse": one.backward_layer}
        for suffix, half in halves.items():
            _check(half, go_backwards=bool(suffix))
            values = dict(named_weights(half.cell))
            for prefix, kind in ("W_x", "weight_ih"), ("W_h", "weight_hh"):
                state_dict[f"{kind}_l{k}{suffix}"] = _fuse(values, prefix)
            if half.cell.use_bias:
                bias = _fuse(values, "b_")
                state_dict[f"bias_ih_l{k}{suffix}"] = bias
                state_dict[f"bias_hh_l{k}{suffix}"] = np.zeros_like(bias)
    return state_dict


def _check(layer, go_backwards):
    if not isinstance(layer, ScratchLSTM):
        raise invalid("layer", layer, "a `ScratchLSTM`")
    for is_valid, rule in (
        (layer.built, "must be built. Call it once on data"),
        (layer.go_backwards == go_backwards, f"must have go_backwards={go_backwards}"),
        (layer.cell.is_standard, "must have the standard gates and activations"),
    ):
        if not is_valid:
            raise ValueError(f"Cannot convert `{layer.name}`: it {rule}.")


def _fuse(values, prefix):
    fused = ops.convert_to_numpy(fuse([values[prefix + gate] for gate in GATES])).T
    # `torch.tensor` cannot read NumPy arrays of bfloat16.
    return fused.astype(np.result_type(fused.dtype, "float32"))
