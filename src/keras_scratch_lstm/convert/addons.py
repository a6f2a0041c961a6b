"""Conversion from the LSTM cells of TensorFlow Addons."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_scratch_lstm._validation import are_numbers, invalid
from keras_scratch_lstm.cells import LayerNormLSTMCell, PeepholeLSTMCell
from keras_scratch_lstm.layer import CELL_ARGUMENTS, ScratchLSTM
from keras_scratch_lstm.per_gate import FUSED_ORDER


def from_addons(weights: Sequence[Any], **arguments: Any) -> ScratchLSTM:
    """Convert an LSTM cell of TensorFlow Addons to a layer with the same weights.

    Args:
        weights: List of arrays, `get_weights()` of a `tfa.rnn.PeepholeLSTMCell`, or of
            a `tfa.rnn.LayerNormLSTMCell` with the default `norm_epsilon`.
        **arguments: Arguments of `ScratchLSTM`, such as `return_sequences`, and those
            that the old cell had, such as `activation`.

    Returns:
        A built `ScratchLSTM`, whose cell is a `PeepholeLSTMCell` or a
        `LayerNormLSTMCell`.

    Raises:
        ValueError: If the weights are not those of one of the two cells.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import from_addons
    >>> weights = [np.ones((8, 16)), np.ones((4, 16)), np.zeros(16), *np.zeros((3, 4))]
    >>> layer = from_addons(weights, return_sequences=True)
    >>> type(layer.cell).__name__, layer.units
    ('PeepholeLSTMCell', 4)
    """
    weights = _check(weights)
    is_peephole = len(weights) <= 6
    make_cell = PeepholeLSTMCell if is_peephole else LayerNormLSTMCell
    more = 3 if is_peephole else 6  # weights than the standard cell
    fused, others = weights[:-more], weights[-more:]
    options = {key: arguments.pop(key) for key in CELL_ARGUMENTS & arguments.keys()}
    policy = {key: arguments[key] for key in ("dtype",) if key in arguments}
    features, units = len(fused[0]), len(fused[1])
    cell = make_cell(units, use_bias=len(fused) == 3, **options, **policy)
    layer = ScratchLSTM(cell=cell, **arguments)
    layer.build((None, None, features))
    for prefix, values in zip(("W_x", "W_h", "b_"), fused, strict=False):
        for gate, value in zip(FUSED_ORDER, np.split(values, 4, -1), strict=True):
            getattr(cell, prefix + gate).assign(value)
    for weight, value in zip(cell.weights[-more:], others, strict=True):
        weight.assign(value)
    layer._has_converted_weights = True
    return layer


def _check(weights):
    rule = (
        "the weights of a `tfa.rnn.PeepholeLSTMCell` or `tfa.rnn.LayerNormLSTMCell`, "
        "as `get_weights` returns them"
    )
    try:
        weights = [np.asarray(weight) for weight in weights]
        shapes = [weight.shape for weight in weights]
    except (TypeError, ValueError):
        raise invalid("weights", weights, rule) from None
    units = shapes[1][0] if len(shapes) > 1 and shapes[1] else 0
    features = shapes[0][0] if shapes and shapes[0] else 0
    kernels, bias = [(features, 4 * units), (units, 4 * units)], [(4 * units,)]
    norms = [(4 * units,)] * 4 + [(units,)] * 2
    expected = [
        [*kernels, *biases, *others]
        for biases in (bias, [])
        for others in ([(units,)] * 3, norms)
    ]
    if shapes not in expected or not all(map(are_numbers, weights)):
        raise invalid("weights", shapes, rule)
    return weights
