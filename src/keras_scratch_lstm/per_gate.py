"""Arguments and weights that differ per gate, and the order of fused gates."""

from typing import Any, TypeGuard

from keras import constraints, initializers, ops, regularizers

GATES = ("i", "f", "o", "c")
WEIGHT_NAMES = [prefix + gate for gate in GATES for prefix in ("W_x", "W_h", "b_")]

# Keras, cuDNN and PyTorch concatenate the gates in this order.
FUSED_ORDER = ("i", "f", "c", "o")

# The arguments that can be set per gate: the Keras module of each, and the default.
OPTIONS: dict[str, tuple[Any, str | None]] = {
    "kernel_initializer": (initializers, "glorot_uniform"),
    "recurrent_initializer": (initializers, "orthogonal"),
    "bias_initializer": (initializers, "zeros"),
    "kernel_regularizer": (regularizers, None),
    "recurrent_regularizer": (regularizers, None),
    "bias_regularizer": (regularizers, None),
    "kernel_constraint": (constraints, None),
    "recurrent_constraint": (constraints, None),
    "bias_constraint": (constraints, None),
}


def is_per_gate(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether `value` is a dict of gates, rather than a serialized object."""
    return isinstance(value, dict) and "class_name" not in value


def resolve(argument, value, get, default=None):
    """Resolve an argument by `get` to a Keras object, or to a dict with one per gate.

    Gates that a given dict leaves out have the default.
    """
    if not is_per_gate(value):
        value = get(value)
        _check_separable(argument, value)
        return value
    if unknown := set(value) - set(GATES):
        raise ValueError(
            f"The keys of `{argument}` must be among 'i', 'f', 'o' and 'c'. Received: "
            f"{', '.join(sorted(map(repr, unknown)))}"
        )
    return {gate: get(value.get(gate, default)) for gate in GATES}


def is_separable(value, weight):
    """Whether a regularizer or constraint acts on a fused weight as on each gate's."""
    sums = (regularizers.L1, regularizers.L2, regularizers.L1L2)
    norms = (constraints.MaxNorm, constraints.MinMaxNorm, constraints.UnitNorm)
    # A bias has one axis, which spans the gates.
    by_column = type(value) in norms and value.axis in (0, [0]) and weight != "bias"
    return by_column or type(value) in (*sums, constraints.NonNeg)


def _check_separable(argument, value):
    """Reject what the built-in cell would apply to all gates at once.

    Custom regularizers and constraints are accepted, since nothing is known of them.
    """
    acts_on_weights = isinstance(
        value, regularizers.Regularizer | constraints.Constraint
    )
    from_keras = type(value).__module__.startswith("keras.")
    if (
        acts_on_weights
        and from_keras
        and not is_separable(value, argument.split("_")[0])
    ):
        raise ValueError(
            f"`{argument}` must act on each gate alone. Received: "
            f"{type(value).__name__}, which acts across gates if they share a "
            "variable. Pass a dict with one per gate to apply it to each matrix."
        )


def serialize(value, serialize_one):
    """The inverse of `resolve`, for `get_config`."""
    if isinstance(value, dict):
        return {gate: serialize_one(value[gate]) for gate in GATES}
    return serialize_one(value)


def pick(value, gate):
    """The object for one gate in a result of `resolve`."""
    return value[gate] if isinstance(value, dict) else value


def fuse(weights):
    """Concatenate four tensors in the order of `GATES` to one in `FUSED_ORDER`."""
    of_gate = dict(zip(GATES, weights, strict=True))
    return ops.concatenate([of_gate[gate] for gate in FUSED_ORDER], -1)


def named_weights(cell):
    """The weights of either kind of cell as pairs of name and tensor, by `GATES`."""
    if not hasattr(cell, "recurrent_kernel"):
        return [(weight.name, weight.value) for weight in cell.weights]
    fused = {"W_x": cell.kernel, "W_h": cell.recurrent_kernel, "b_": cell.bias}
    tensors = {
        prefix + gate: tensor
        for prefix, weight in fused.items()
        if weight is not None
        for gate, tensor in zip(
            FUSED_ORDER, ops.split(weight.value, 4, axis=-1), strict=True
        )
    }
    return [(name, tensors[name]) for name in WEIGHT_NAMES if name in tensors]


def split_initializer(initializer, units, forget_bias=False):
    """A dict with an initializer for the weight of each gate, from that of `resolve`.

    A single initializer is drawn once for the fused weight, as in the built-in cell,
    and each gate takes its slice. So equal seeds give equal weights, and Glorot's
    fan-out and orthogonal rows are those of the fused weight. With `forget_bias`, the
    slice of the forget gate is 1.
    """
    if isinstance(initializer, dict):
        return initializer
    initializer = initializer or initializers.get("glorot_uniform")  # as `add_weight`
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
                return fused  # a tracer, which must not be stored
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
