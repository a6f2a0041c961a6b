"""The public functions have types; whether they are right, `mypy` checks."""

import inspect

import pytest

import keras_scratch_lstm
from keras_scratch_lstm import cell, convert, tracing

PUBLIC = [getattr(keras_scratch_lstm, name) for name in keras_scratch_lstm.__all__]
PUBLIC += [cell.Gates, tracing.Saturation, convert.from_torch, convert.to_torch]


def functions(thing):
    """A function, or the public ones that a class has itself."""
    if not inspect.isclass(thing):
        yield thing
        return
    for name, value in vars(thing).items():
        value = getattr(value, "fget", getattr(value, "__func__", value))
        if inspect.isfunction(value) and (name == "__init__" or name[0] != "_"):
            yield value


def without_types(function):
    signature = inspect.signature(function)
    found = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    if signature.return_annotation is signature.empty:
        found.append("return")
    return found


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_each_argument_has_a_type(thing):
    found = {f.__qualname__: without_types(f) for f in functions(thing)}
    of_the_cell = "_of_the_cell.<locals>.<lambda>"  # `layer.units` and its sisters
    found.pop(of_the_cell, None)
    assert not {name: missing for name, missing in found.items() if missing}


def test_each_argument_of_the_pictures_has_a_type():
    pytest.importorskip("matplotlib")
    from keras_scratch_lstm import plotting

    pictures = [f for name, f in vars(plotting).items() if name.startswith("plot_")]
    assert len(pictures) == 4
    assert not [missing for f in pictures if (missing := without_types(f))]


def test_what_is_no_type_is_found():
    def untyped(x, y: int = 0): ...

    assert without_types(untyped) == ["x", "return"]
