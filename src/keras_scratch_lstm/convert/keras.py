"""Conversion between `ScratchLSTM` and `keras.layers.LSTM`."""

import tempfile
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_scratch_lstm._keras import all_layers, sublayers
from keras_scratch_lstm._validation import invalid
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.per_gate import (
    GATES,
    fuse,
    is_per_gate,
    is_separable,
    named_weights,
)

_TO_SCRATCH = {layers.LSTM: ScratchLSTM, layers.LSTMCell: ScratchLSTMCell}
_TO_BUILTIN = {scratch: builtin for builtin, scratch in _TO_SCRATCH.items()}
_CELLS = (layers.LSTMCell, ScratchLSTMCell)

# The built-in cell's weights, and the prefixes of the per-gate weights.
_FUSED = {"kernel": "W_x", "recurrent_kernel": "W_h", "bias": "b_"}


def to_scratch(model: Any) -> Any:
    """Copy a layer or model, with `ScratchLSTM` in place of `keras.layers.LSTM`.

    Every `keras.layers.LSTM` becomes a `ScratchLSTM` and every
    `keras.layers.LSTMCell` a `ScratchLSTMCell`, also inside nested models and wrappers
    such as `keras.layers.Bidirectional`. All other layers are copied. The original is
    unchanged and shares nothing with the copy.

    Names, weights, `trainable` flags, dtype policies, random seeds, the states of
    stateful layers and the arguments of `compile()` are copied; the optimizer's state
    is not. If a layer is not built, only its configuration is converted.

    Convert a `keras.layers.Bidirectional` as a whole. Keras re-creates the layer that
    is passed to it, so `Bidirectional(to_scratch(layer))` would lose the weights and
    raises an error.

    Args:
        model: A layer, a cell, or a Sequential or Functional model that
            contains a built-in LSTM.

    Returns:
        The converted layer, cell or model.

    Raises:
        ValueError: If a part cannot be converted; the message names it.

    Example:

    >>> import keras
    >>> from keras_scratch_lstm import to_scratch
    >>> model = keras.Sequential([keras.Input((10, 8)), keras.layers.LSTM(4)])
    >>> [weight.name for weight in to_scratch(model).weights[:3]]
    ['W_xi', 'W_hi', 'b_i']
    """
    return _convert(model, _TO_SCRATCH)


def to_builtin(model: Any) -> Any:
    """Copy a layer or model, with `keras.layers.LSTM` in place of `ScratchLSTM`.

    The inverse of `to_scratch`, which see for what is copied. A round trip in either
    order restores the weights bit for bit.

    Per-gate initializers are dropped if the layer is built. Other options that the
    built-in layers do not have raise an error: regularizers and constraints that
    differ between gates, a frozen gate beside others, `time_major`, custom cells.

    Convert a `keras.layers.Bidirectional` as a whole. As with any built-in layer,
    `Bidirectional(to_builtin(layer))` has new weights.

    Args:
        model: A layer, a cell, or a Sequential or Functional model that
            contains a `ScratchLSTM` or a `ScratchLSTMCell`.

    Returns:
        The converted layer, cell or model.

    Raises:
        ValueError: If a part cannot be converted; the message names it.

    Example:

    >>> from keras_scratch_lstm import ScratchLSTM, to_builtin
    >>> layer = ScratchLSTM(4)
    >>> layer.build((None, 10, 8))
    >>> [weight.name for weight in to_builtin(layer).weights]
    ['kernel', 'recurrent_kernel', 'bias']
    """
    return _convert(model, _TO_BUILTIN)


def _convert(old, classes):
    parts = all_layers(old) if isinstance(old, layers.Layer) else []
    lstms = [part for part in parts if isinstance(part, tuple(classes))]
    if not lstms:
        names = " or ".join(f"`{cls.__name__}`" for cls in classes)
        raise invalid("model", old, f"a layer or model that contains {names}")
    owners = {id(p.cell): f"{p.name}/" for p in parts if isinstance(p, layers.RNN)}
    for lstm in lstms:
        _check(lstm, owners.get(id(lstm), "") + lstm.name, classes)
    new = _copy_by_config(old, classes)
    pairs = _pair(old, new, classes, {})
    for one, other in pairs:  # outer layers first, since they set all within them
        other.trainable = one.trainable
    for one, other in pairs:
        _copy_state(one, other)
    for one, other in reversed(pairs):
        if isinstance(one, keras.Model) and one.compiled:
            other.compile_from_config(one.get_compile_config())
    return new


def _error(name, reason):
    return ValueError(f"Cannot convert `{name}`: {reason}")


def _check(part, name, classes):
    """Raise an error if the other class cannot represent a layer or cell."""
    if type(part) not in classes:
        base = next(cls.__name__ for cls in classes if isinstance(part, cls))
        reason = f"`{type(part).__name__}` is a subclass of `{base}`, whose changes"
        raise _error(name, f"{reason} would be lost.")
    if isinstance(part, ScratchLSTM) and part.time_major:
        raise _error(name, "the built-in LSTM has no `time_major`.")
    for weight in ("kernel", "recurrent", "bias") if isinstance(part, _CELLS) else ():
        if is_per_gate(getattr(part, f"{weight}_initializer")) and not part.built:
            reason = f"it is not built, and `{weight}_initializer` differs between"
            raise _error(name, f"{reason} gates. Build it, or pass one initializer.")
        for argument in (f"{weight}_regularizer", f"{weight}_constraint"):
            value = getattr(part, argument)
            first, *others = value.values() if is_per_gate(value) else [value]
            if any(_config(other) != _config(first) for other in others):
                raise _error(name, f"`{argument}` must be the same for all gates.")
            if first is not None and not is_separable(first, weight):
                reason = f"{type(first).__name__} as `{argument}` acts across gates"
                raise _error(name, f"{reason} if they share a variable.")


def _config(value):
    return keras.saving.serialize_keras_object(value)


def _copy_by_config(old, classes):
    """Copy a layer without its weights, its LSTMs as the other classes."""
    parts = {type(part) for part in all_layers(old)}
    # By their full names, as their short names may also be those of Keras classes.
    swapped = {_full_name(cls): new for cls, new in classes.items()}
    own = [cls for cls in parts if not cls.__module__.startswith("keras.")]
    custom = {_full_name(cls): cls for cls in own}

    def retarget(config):
        if not isinstance(config, dict) or "class_name" not in config:
            return None  # unchanged
        config = {key: v for key, v in config.items() if key != "compile_config"}
        name = f"{config.get('module') or '__main__'}.{config['class_name']}"
        if name in swapped:
            config = _swapped_config(config, swapped[name])
        if name in swapped or name in custom:
            config["registered_name"] = name
        return config

    try:
        return keras.saving.deserialize_keras_object(
            keras.tree.traverse(retarget, _config(old), top_down=False),
            custom_objects=custom | swapped,
            safe_mode=False,  # the model is in memory, not from a file
        )
    except Exception as error:  # custom layers may raise anything
        for part in sublayers(old):
            _copy_by_config(part, classes)  # raises an error for the part at fault
        raise _cannot_copy(old) from error


def _cannot_copy(layer):
    reason = "Keras cannot re-create it from its configuration."
    return _error(layer.name, f"{reason} It must be possible to save and load it.")


def _full_name(cls):
    module = "keras.layers" if cls in _TO_SCRATCH else cls.__module__
    return f"{module}.{cls.__name__}"


def _swapped_config(serialized, new):
    """Adapt a serialized LSTM or cell to the class `new`."""
    config, build_config = serialized["config"], serialized.get("build_config")
    if build_config:  # with the shapes of initial states, whose names differ
        shapes = build_config.get("shapes_dict", build_config)
        shape = shapes.get("sequences_shape", shapes.get("input_shape"))
        serialized = serialized | {"build_config": {"input_shape": shape}}
    if new not in _TO_SCRATCH:
        return serialized
    cell = config.get("cell", {"config": {}})["config"]
    config = config | {k: v for k, v in cell.items() if k not in ("name", "trainable")}
    config = {
        # `_check` made sure that all gates have the same regularizer or constraint.
        key: value[GATES[0]] if is_per_gate(value) else value
        for key, value in config.items()
        if key not in ("cell", "time_major")
        and not (key.endswith("_initializer") and is_per_gate(value))
    }
    return serialized | {"config": config}


def _pair(old, new, classes, copies):
    """Pair each layer with its copy, outer layers before those within them."""
    if copies.setdefault(id(old), new) is not new:
        reason = "it is shared between models or wrappers, and its copies would not be."
        raise _error(old.name, f"{reason} Share layers only within one model.")
    parts, copied = sublayers(old), sublayers(new)
    expected = [classes.get(type(part), type(part)) for part in [old, *parts]]
    if expected != [type(part) for part in [new, *copied]]:
        raise _cannot_copy(old)
    by_name = {part.name: part for part in copied}
    if by_name.keys() == {part.name for part in parts} and len(by_name) == len(parts):
        copied = [by_name[part.name] for part in parts]
    pairs = [(old, new)]
    for one, other in zip(parts, copied, strict=True):
        pairs += _pair(one, other, classes, copies)
    return pairs


def _copy_state(old, new):
    """Copy what a configuration does not hold; without that of sublayers."""
    if type(old) is type(new):
        _copy_variables(old, new)
    elif isinstance(old, _CELLS):
        _copy_cell(old, new)
    else:
        new.use_cudnn = old.use_cudnn  # missing in the built-in layer's configuration
        if isinstance(new, ScratchLSTM):
            new._has_converted_weights = old.built
    for one, other in zip(_states(old), _states(new), strict=True):
        other.assign(_numpy(one))


def _copy_cell(old, new):
    new.seed_generator.state.assign(_numpy(old.seed_generator.state))
    values = dict(named_weights(old)) if old.built else {}
    for fused, prefix in _FUSED.items():
        names = [prefix + gate for gate in GATES if prefix + gate in values]
        if isinstance(new, ScratchLSTMCell):
            for name in names:
                getattr(new, name).assign(values[name])
                getattr(new, name).trainable = getattr(old, fused).trainable
        elif names:
            frozen = [name for name in names if not getattr(old, name).trainable]
            if len(frozen) not in (0, len(GATES)):
                reason = f"all or none of {prefix}* must be frozen, as they become one"
                raise _error(old.name, f"{reason} variable. Received: frozen={frozen}")
            getattr(new, fused).assign(fuse([values[name] for name in names]))
            getattr(new, fused).trainable = not frozen


def _copy_variables(old, new):
    variables, copied = _variables(old), _variables(new)
    if [tuple(v.shape) for v in variables] != [tuple(v.shape) for v in copied]:
        raise _cannot_copy(old)
    for one, other in zip(variables, copied, strict=True):
        other.assign(_numpy(one))
        other.trainable = one.trainable
    # Some layers have more state than variables, such as a vocabulary.
    store = {}
    old.save_own_variables(store)
    new.load_own_variables({k: _numpy(v) for k, v in store.items()})
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as directory:
            old.save_assets(directory)
            new.load_assets(directory)


def _variables(layer):
    """The layer's own variables, including random seeds."""
    others = [v for part in sublayers(layer) for v in part.variables] + _states(layer)
    others = {id(variable) for variable in others}
    return [variable for variable in layer.variables if id(variable) not in others]


def _states(layer):
    states = layer.states if isinstance(layer, layers.RNN) else None
    return keras.tree.flatten(states or [])


def _numpy(variable):
    # A copy, since JAX donates the buffers of variables in `fit`.
    return np.array(keras.ops.convert_to_numpy(variable))
