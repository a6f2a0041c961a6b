"""Convert between `ScratchLSTM` and `keras.layers.LSTM`."""

import tempfile
from typing import Any

import keras
import numpy as np
from keras import constraints, layers, regularizers

from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES, is_per_gate

_TO_SCRATCH = {layers.LSTM: ScratchLSTM, layers.LSTMCell: ScratchLSTMCell}
_TO_BUILTIN = {ours: builtin for builtin, ours in _TO_SCRATCH.items()}
_LAYERS = (layers.LSTM, ScratchLSTM)
_CELLS = (layers.LSTMCell, ScratchLSTMCell)

# The built-in cell's weights, and the letters of ours.
_LETTERS = {"kernel": "W_x", "recurrent_kernel": "W_h", "bias": "b_"}

# What acts on the four gates side by side as on each alone: the sums over all
# numbers, and, in a matrix, what looks at each column for itself.
_SUMS = (regularizers.L1, regularizers.L2, regularizers.L1L2)
_BY_COLUMN = (constraints.MaxNorm, constraints.MinMaxNorm, constraints.UnitNorm)


def to_scratch(layer_or_model: Any) -> Any:
    """The same cell, layer or model, with our LSTM in place of the built-in one.

    Every `keras.layers.LSTM` becomes a `ScratchLSTM`, and every
    `keras.layers.LSTMCell` a `ScratchLSTMCell`, also within
    `keras.layers.Bidirectional`, `keras.layers.RNN` and other wrappers, and
    within models that are layers of the model. All else is copied. The result
    shares nothing with the original, which stays as it was.

    Names, weights, what is trainable, dtype policies, the states of stateful
    layers and of random seeds are carried over, and what a model was compiled
    with; but its optimizer starts anew. Where there are no weights yet, the
    arguments alone are carried over.

    Args:
        layer_or_model: A layer or a cell, or a Sequential or Functional model,
            with a built-in LSTM in it.

    Returns:
        A new layer, cell or model.

    Raises:
        ValueError: It cannot be converted in full; the message names the layer
            that is the reason.

    Example:

    >>> import keras
    >>> from keras_scratch_lstm.convert import to_scratch
    >>> model = keras.Sequential([keras.Input((10, 8)), keras.layers.LSTM(4)])
    >>> [weight.name for weight in to_scratch(model).weights[:3]]
    ['W_xi', 'W_hi', 'b_i']
    """
    return _convert(layer_or_model, _TO_SCRATCH)


def to_builtin(layer_or_model: Any) -> Any:
    """The same cell, layer or model, with the built-in LSTM in place of ours.

    The inverse of `to_scratch`: what is said there holds here. A round trip, in
    either order, gives back the same weights bit for bit.

    The built-in layers have no arguments by gate. A dict of initializers is
    left out where it has had its effect, that is where there are weights.
    Whatever else the built-in layers cannot express is refused: regularizers
    and constraints that differ from gate to gate, one gate frozen and another
    not, `time_major`, a cell of one's own.

    Args:
        layer_or_model: A layer or a cell, or a Sequential or Functional model,
            with a `ScratchLSTM` or a `ScratchLSTMCell` in it.

    Returns:
        A new layer, cell or model.

    Raises:
        ValueError: It cannot be converted in full; the message names the layer
            that is the reason.

    Example:

    >>> from keras_scratch_lstm import ScratchLSTM
    >>> from keras_scratch_lstm.convert import to_builtin
    >>> layer = ScratchLSTM(4)
    >>> layer.build((None, 10, 8))
    >>> [weight.name for weight in to_builtin(layer).weights]
    ['kernel', 'recurrent_kernel', 'bias']
    """
    return _convert(layer_or_model, _TO_BUILTIN)


def _convert(old, classes):
    if not isinstance(old, layers.Layer):
        raise ValueError(
            f"`layer_or_model` is {old!r}; expected a Keras layer, cell or model."
        )
    _check(old, classes)
    new = _copy(old, classes)
    pairs = _pairs(old, new, classes)
    # A layer hands its flag down to all within it, so the outer ones go first.
    for one, other in sorted(pairs, key=lambda pair: -len(_all_within(pair[0]))):
        other.trainable = one.trainable
    for one, other in pairs:
        _carry_over(one, other)
    for one, other in reversed(pairs):
        if isinstance(one, keras.Model) and one.compiled:
            _compile(one, other)
    return new


def _within(layer):
    """The layers that a layer is made of."""
    # `model.layers` has only those of models.
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _all_within(layer):
    """The layer, those within it, those within them, and so on."""
    return list(layer._flatten_layers())


# --- what cannot be converted ------------------------------------------------


def _check(old, classes):
    """Refuses, before anything is made, what has no counterpart."""
    parts = _all_within(old)
    lstms = [part for part in parts if isinstance(part, tuple(classes))]
    if not lstms:
        names = " or ".join(f"`{cls.__name__}`" for cls in classes)
        raise ValueError(
            f"`layer_or_model` is `{old.name}`, a {type(old).__name__} without any "
            f"{names}; expected a layer or model that has one."
        )
    for lstm in lstms:
        name = _name(lstm, parts)
        if type(lstm) not in classes:
            base = next(cls.__name__ for cls in classes if isinstance(lstm, cls))
            raise ValueError(
                f"`{name}` is a {type(lstm).__name__}, and what a subclass of {base} "
                f"changes cannot be carried over; expected a {base} itself."
            )
        if isinstance(lstm, ScratchLSTM):
            _check_layer(lstm)
        if isinstance(lstm, _CELLS):
            _check_arguments(lstm, name)
        if isinstance(lstm, ScratchLSTMCell) and lstm.built:
            _check_what_is_frozen(lstm, name)


def _name(lstm, parts):
    """A layer's name; for a cell, with that of the layer around it."""
    around = [p.name for p in parts if isinstance(p, layers.RNN) and p.cell is lstm]
    return "/".join([*around[:1], lstm.name])


def _check_layer(layer):
    if layer.time_major:
        raise ValueError(
            f"`{layer.name}` has `time_major` set, which the built-in LSTM does not "
            "have; expected a layer with the batch first."
        )
    policy, of_the_cell = layer.dtype_policy.name, layer.cell.dtype_policy.name
    if policy != of_the_cell:
        raise ValueError(
            f"`{layer.name}` has the dtype policy {policy!r} and its cell "
            f"{of_the_cell!r}; expected one for both, as the built-in LSTM has."
        )


def _check_arguments(cell, name):
    """Refuses what means something else side by side than gate by gate."""
    for weight in ("kernel", "recurrent", "bias"):
        if isinstance(getattr(cell, f"{weight}_initializer"), dict) and not cell.built:
            raise ValueError(
                f"`{name}` has a `{weight}_initializer` by gate and no weights yet; "
                "expected one initializer for all gates, or a cell that is built."
            )
        for kind, is_the_same in _KINDS.items():
            argument = f"{weight}_{kind}"
            value = getattr(cell, argument)
            choices = list(value.values()) if isinstance(value, dict) else [value]
            if any(_config(choice) != _config(choices[0]) for choice in choices):
                raise ValueError(
                    f"`{name}` has a `{argument}` that differs from gate to gate; "
                    "expected the same for all gates, as the built-in cell has it."
                )
            if choices[0] is not None and not is_the_same(choices[0], weight):
                raise ValueError(
                    f"`{name}` has {_config(choices[0])} as `{argument}`, which does "
                    "not do the same to the gates side by side as to each alone; "
                    f"expected {_EXPECTED[kind]}."
                )


def _is_a_sum(regularizer, weight):
    return type(regularizer) in _SUMS


def _goes_by_number_or_column(constraint, weight):
    if type(constraint) is constraints.NonNeg:
        return True
    # The only axis of a bias goes from gate to gate.
    return (
        type(constraint) in _BY_COLUMN
        and constraint.axis in (0, [0])
        and weight != "bias"
    )


_KINDS = {"regularizer": _is_a_sum, "constraint": _goes_by_number_or_column}
_EXPECTED = {
    "regularizer": "L1, L2 or L1L2",
    "constraint": "NonNeg, or on a matrix MaxNorm, MinMaxNorm or UnitNorm with axis 0",
}


def _config(choice):
    return keras.saving.serialize_keras_object(choice)


def _check_what_is_frozen(cell, name):
    for letter in _LETTERS.values() if cell.use_bias else ("W_x", "W_h"):
        weights = [getattr(cell, letter + gate) for gate in GATES]
        frozen = [weight.name for weight in weights if not weight.trainable]
        if 0 < len(frozen) < len(GATES):
            raise ValueError(
                f"`{name}` has only {', '.join(frozen)} frozen of its {letter}*, which "
                "are one variable in the built-in cell; expected all of them or none."
            )


# --- the copy ----------------------------------------------------------------


def _copy(old, classes):
    """A copy by configuration, without the weights, its LSTMs of other classes."""
    swaps = {tuple(_header(cls).values()): new for cls, new in classes.items()}

    def swap(config):
        if not isinstance(config, dict) or "class_name" not in config:
            return None  # stays as it is
        config = {k: v for k, v in config.items() if k != "compile_config"}
        new = swaps.get(tuple(config.get(key) for key in _header(ScratchLSTM)))
        if new is None:
            return config
        return {**config, **_header(new), "config": _adapt(config["config"], new)}

    parts = {type(part) for part in _all_within(old)}
    try:
        return keras.saving.deserialize_keras_object(
            keras.tree.traverse(
                swap, keras.saving.serialize_keras_object(old), top_down=False
            ),
            custom_objects={keras.saving.get_registered_name(c): c for c in parts},
            safe_mode=False,  # the code in it is not from a file
        )
    except Exception as error:  # whatever the code of a custom layer raises
        for part in _within(old):
            _copy(part, classes)  # names the part, if that is the reason
        raise ValueError(_CANNOT_COPY.format(old.name)) from error


_CANNOT_COPY = (
    "`{}` cannot be copied by its configuration, which does not say all that it "
    "holds; expected layers and models that Keras can save and load."
)


def _header(cls):
    """How a configuration names a class."""
    if cls in _TO_SCRATCH:
        module, registered_name = "keras.layers", None
    else:
        module = cls.__module__
        registered_name = keras.saving.get_registered_name(cls)
    return {
        "module": module,
        "class_name": cls.__name__,
        "registered_name": registered_name,
    }


def _adapt(config, new):
    """The configuration of one LSTM, as that of its counterpart `new`."""
    if new not in _TO_SCRATCH:
        return config
    config = {key: value for key, value in config.items() if key != "time_major"}
    cell = config.pop("cell", None)
    if cell is not None:
        of_the_layer = ("name", "trainable", "dtype")
        config |= {k: v for k, v in cell["config"].items() if k not in of_the_layer}
    for argument, value in list(config.items()):
        if not argument.endswith(("_initializer", "_regularizer", "_constraint")):
            continue
        if is_per_gate(value):
            del config[argument]
            if not argument.endswith("_initializer"):
                config[argument] = value[GATES[0]]  # that of all gates
    return config


def _pairs(old, new, classes, copies=None):
    """Each layer with its copy, the outer ones before those within."""
    copies = {} if copies is None else copies
    if id(old) in copies:
        if copies[id(old)] is not new:
            raise ValueError(
                f"`{old.name}` is in several models or wrappers at once, and copied "
                "by configuration would be several layers; expected layers that are "
                "shared only within one model."
            )
        return []
    copies[id(old)] = new
    ours, theirs = _within(old), _within(new)
    expected = [classes.get(type(layer), type(layer)) for layer in (old, *ours)]
    if expected != [type(layer) for layer in (new, *theirs)]:
        raise ValueError(_CANNOT_COPY.format(old.name))
    by_name = {layer.name: layer for layer in theirs}
    if by_name.keys() == {layer.name for layer in ours} and len(by_name) == len(ours):
        theirs = [by_name[layer.name] for layer in ours]
    pairs = [(old, new)]
    for one, other in zip(ours, theirs, strict=True):
        pairs += _pairs(one, other, classes, copies)
    return pairs


# --- what no configuration says ----------------------------------------------


def _carry_over(old, new):
    if isinstance(old, _CELLS) and type(old) is not type(new):
        _carry_over_cell(old, new)
    elif isinstance(old, _LAYERS) and type(old) is not type(new):
        new.use_cudnn = old.use_cudnn  # the built-in layer's does not say it
    else:
        _carry_over_own(old, new)
    for one, other in zip(_states(old), _states(new), strict=True):
        other.assign(_numpy(one))


def _carry_over_cell(old, new):
    new.seed_generator.state.assign(_numpy(old.seed_generator.state))
    if not old.built:
        return
    fused, own = (old, new) if type(old) in _TO_SCRATCH else (new, old)
    for name, letter in _LETTERS.items():
        one = getattr(fused, name)
        if one is None:  # no bias
            continue
        four = [getattr(own, letter + gate) for gate in FUSED_ORDER]
        if fused is old:
            for weight, value in zip(four, np.split(_numpy(one), 4, -1), strict=True):
                weight.assign(value)
                weight.trainable = one.trainable
        else:
            one.assign(np.concatenate([_numpy(weight) for weight in four], -1))
            one.trainable = four[0].trainable


def _carry_over_own(old, new):
    """The variables of a layer itself, not of those within it."""
    ours, theirs = _own_variables(old), _own_variables(new)
    if [tuple(v.shape) for v in ours] != [tuple(v.shape) for v in theirs]:
        raise ValueError(_CANNOT_COPY.format(old.name))
    for one, other in zip(ours, theirs, strict=True):
        other.assign(_numpy(one))
        other.trainable = one.trainable
    # Some layers hold more than variables, such as a vocabulary.
    store = {}
    old.save_own_variables(store)
    new.load_own_variables({key: _numpy(value) for key, value in store.items()})
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _own_variables(layer):
    others = [*_states(layer), *(v for part in _within(layer) for v in part.variables)]
    others = {id(variable) for variable in others}
    return [variable for variable in layer.variables if id(variable) not in others]


def _states(layer):
    states = layer.states if isinstance(layer, layers.RNN) else None
    return keras.tree.flatten(states or [])


def _numpy(variable):
    return keras.ops.convert_to_numpy(variable)


def _compile(old, new):
    try:
        new.compile_from_config(old.get_compile_config())
    except Exception as error:  # whatever a custom loss or metric raises
        raise ValueError(
            f"`{old.name}` is compiled with what Keras cannot copy; expected custom "
            "losses, metrics and optimizers to be registered with "
            "`keras.saving.register_keras_serializable`."
        ) from error
