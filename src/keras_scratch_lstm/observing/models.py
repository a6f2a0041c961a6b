"""Find the recurrent layers of a model."""

import operator
import os

import keras

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.convert.files import load_model


def load(model):
    """Return the model or layer, loaded if it is the path of a file."""
    if isinstance(model, (str, os.PathLike)):
        return load_model(model)
    if not isinstance(model, keras.layers.Layer):
        rule = "a Keras model or layer, or the path of a model's file"
        raise _validation.invalid("model", model, rule)
    return model


def find_all(model):
    """Return the LSTMs that a model calls, in its order; `Bidirectional` is one."""
    return list(dict.fromkeys(_find(model)))


def _find(layer):
    if all(map(_is_lstm, directions_of(layer))):
        yield layer
        return
    for sublayer in _keras.sublayers(layer):
        yield from _find(sublayer)


def _is_lstm(layer):
    cells = ScratchLSTMCell, keras.layers.LSTMCell
    return isinstance(layer, keras.layers.RNN) and isinstance(layer.cell, cells)


def directions_of(layer):
    """Return both layers of a `Bidirectional` layer, or else the layer itself."""
    if isinstance(layer, keras.layers.Bidirectional):
        return [layer.forward_layer, layer.backward_layer]
    return [layer]


def select(model, layer=None, simple_rnn=False, argument="layer"):
    """Load a model, and find what the argument `layer` of `trace_gates` selects.

    Args:
        model: A model, a layer, or a path.
        layer: See `trace_gates`.
        simple_rnn: Boolean, whether `layer` may select a `SimpleRNN`.
        argument: String, the name of the argument for errors.

    Returns:
        `(model, lstms)`: one LSTM, or both of a `Bidirectional` layer.
    """
    model = load(model)
    lstms = _find_simple_rnn(model, layer) if simple_rnn else []
    lstms = lstms or find(model, layer, argument)
    check_built(model, *(lstm.cell for lstm in lstms))
    return model, lstms


def check_built(model, *layers):
    """Raise an error if the model or one of the layers is not built."""
    if not all(layer.built for layer in (model, *layers)):
        raise ValueError(
            f"`model` must be built. Received: {model.name!r}. Call it once on data, "
            "or add `keras.Input`."
        )


def select_one(model, layer=None):
    """The same for one LSTM, which is not a `Bidirectional` layer."""
    model, lstms = select(model, layer)
    if len(lstms) > 1:
        names = " or ".join(repr(lstm.name) for lstm in lstms)
        raise ValueError(
            "`layer` must be one direction of the `Bidirectional` layer. Pass "
            f"`layer=` {names}. Received: layer={getattr(layer, 'name', layer)!r}"
        )
    return model, lstms[0]


def find(model, layer=None, argument="layer"):
    """Return the LSTMs of a model that `layer` selects."""
    found = find_all(model)
    if not found:
        raise ValueError(
            f"`model` must be or contain a `ScratchLSTM`, an `LSTM`, or an `RNN` with "
            f"a `ScratchLSTMCell` or an `LSTMCell`. Received: {model.name!r}"
        )
    choices = {one: directions_of(one) for one in found}
    for one in found:
        choices |= {lstm: [lstm] for lstm in directions_of(one)}
    selected = _select(layer, found, choices)
    if len(selected) > 1:
        raise ValueError(
            f"`{argument}` must be the layer itself, since {len(selected)} LSTMs of "
            f"{model.name!r} have the same name. Received: {argument}={layer!r}"
        )
    if not selected:
        names = [repr(one.name) for one in found[:8]] + ["…"] * (len(found) > 8)
        received = getattr(layer, "name", repr(layer)[:40])
        raise ValueError(
            f"`{argument}` must be the name or index of an LSTM of {model.name!r}, or "
            f"the layer itself. Pass `{argument}=` to choose one of: "
            f"{', '.join(names)}. Received: {argument}={received}"
        )
    lstms = choices[selected[0]]
    for lstm in lstms:
        cell = type(lstm.cell)
        if cell is not keras.layers.LSTMCell and not issubclass(cell, ScratchLSTMCell):
            raise ValueError(
                f"`{argument}` must have a `ScratchLSTMCell` (or a subclass) or a "
                "plain `keras.layers.LSTMCell`, whose gates are known. Received: "
                f"{lstm.name!r} with a {cell.__name__!r}"
            )
    return lstms


def _select(layer, found, choices):
    if layer is None:
        return found if len(found) == 1 else []
    if isinstance(layer, str):
        return [choice for choice in choices if choice.name == layer]
    if isinstance(layer, keras.layers.Layer):
        return [layer] if layer in choices else []
    try:
        return [found[operator.index(layer)]]
    except (IndexError, TypeError):
        return []


def _find_simple_rnn(model, layer):
    layers = _keras.all_layers(model)
    found = [x for x in layers if isinstance(x, keras.layers.SimpleRNN)]
    if layer is not None:
        found = [x for x in found if x is layer or x.name == layer]
    elif find_all(model):
        return []
    return found if len(found) == 1 else []
