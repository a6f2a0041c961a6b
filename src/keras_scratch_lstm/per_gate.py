"""Arguments that may differ from gate to gate."""

from typing import Any, TypeGuard

from keras import initializers, ops

from keras_scratch_lstm import _validation

GATES = ("i", "f", "o", "c")

# The order in which the built-in cell lays the gates side by side.
FUSED_ORDER = ("i", "f", "c", "o")


def is_per_gate(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether an argument is a choice by gate: a dict, but no serialized object."""
    return isinstance(value, dict) and "class_name" not in value


def resolve(argument, value, get, default=None):
    """Turns one argument into Keras objects: a single one, or one a gate.

    Args:
        argument: String, the argument's name, for error messages.
        value: What the user gave: anything that `get` takes, or a dict of
            such things with gates for keys.
        get: Function that turns an identifier into a Keras object, such as
            `keras.initializers.get`.
        default: The identifier for a gate that the dict leaves out.

    Returns:
        An object, or a dict with one for each gate.
    """
    kind = argument.rpartition("_")[2]
    expected = f"something that Keras has as {kind}, or a dict of such by gate"

    def interpret(value):
        return _validation.interpret(argument, value, get, expected)

    if not is_per_gate(value):
        return interpret(value)
    unknown = [gate for gate in value if gate not in GATES]
    if unknown:
        raise ValueError(
            f"`{argument}` names the gate {unknown[0]!r}; expected a dict with "
            f"keys among {', '.join(map(repr, GATES))}."
        )
    return {gate: interpret(value.get(gate, default)) for gate in GATES}


def serialize(value, serialize_one):
    """The inverse of `resolve`, for `get_config`."""
    if isinstance(value, dict):
        return {gate: serialize_one(value[gate]) for gate in GATES}
    return serialize_one(value)


def pick(value, gate):
    """One gate's share of what `resolve` returned."""
    return value[gate] if isinstance(value, dict) else value


def fuse(weights):
    """Four gates' tensors, in the order of `GATES`, as one in the fused order."""
    of_gate = dict(zip(GATES, weights, strict=True))
    return ops.concatenate([of_gate[gate] for gate in FUSED_ORDER], -1)


def split_initializer(initializer, units, forget_bias=False):
    """One initializer for each gate's weight.

    A single initializer is drawn once, with the four gates side by side as in
    the built-in cell, and each gate takes its slice. So a seed means the same
    numbers here and there, and glorot's fan-out and orthogonal rows stay what
    they are there.

    Args:
        initializer: What `resolve` returned.
        units: Integer, the width of one gate.
        forget_bias: Boolean, whether the forget gate starts at 1.

    Returns:
        Dict of gate to initializer.
    """
    if isinstance(initializer, dict):
        return initializer
    # `add_weight` reads None so, too.
    initializer = initializer or initializers.get("glorot_uniform")
    if forget_bias:
        initializer = _with_forget_bias(initializer, units)
    drawn = None

    def draw_once(shape, dtype):
        nonlocal drawn
        if drawn is None:
            fused = initializer(shape, dtype=dtype)
            try:
                drawn = ops.convert_to_numpy(fused)
            except (TypeError, NotImplementedError):
                return fused  # within a trace: a stand-in, not to be kept
        return drawn

    def initializer_of(gate):
        start = FUSED_ORDER.index(gate) * units

        def initialize(shape, dtype=None):
            fused = draw_once((*shape[:-1], 4 * units), dtype)
            return ops.copy(ops.convert_to_tensor(fused[..., start : start + units]))

        return initialize

    return {gate: initializer_of(gate) for gate in GATES}


def _with_forget_bias(initializer, units):
    def initialize(shape, dtype=None):
        b_i = initializer((units,), dtype=dtype)
        b_f = ops.ones((units,), dtype=dtype)
        b_c_b_o = initializer((2 * units,), dtype=dtype)
        return ops.concatenate([b_i, b_f, b_c_b_o])

    return initialize


def named_weights(cell):
    """A cell's weights, under the letters of the equations.

    Args:
        cell: A built `ScratchLSTMCell` or `keras.layers.LSTMCell`.

    Returns:
        List of pairs, name and tensor, in the order of `ScratchLSTMCell.weights`.
    """
    if not hasattr(cell, "recurrent_kernel"):
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
