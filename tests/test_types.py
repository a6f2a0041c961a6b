"""Every public function is annotated; mypy checks the annotations."""

import inspect

import pytest

import keras_scratch_lstm

PUBLIC = [getattr(keras_scratch_lstm, name) for name in keras_scratch_lstm.__all__]


def functions(thing):
    """A function, or the public methods and properties that a class defines."""
    if not inspect.isclass(thing):
        yield thing
        return
    for name, value in vars(thing).items():
        value = getattr(value, "fget", getattr(value, "__func__", value))
        if inspect.isfunction(value) and (name == "__init__" or name[0] != "_"):
            yield value


def missing_annotations(function):
    signature = inspect.signature(function)
    names = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.annotation is parameter.empty and name not in ("self", "cls")
    ]
    return names + ["return"] * (signature.return_annotation is signature.empty)


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_public_functions_are_annotated(thing):
    missing = {f.__qualname__: missing_annotations(f) for f in functions(thing)}
    assert not any(missing.values()), missing


def test_plots_are_annotated():
    pytest.importorskip("matplotlib")
    from keras_scratch_lstm import plotting

    plots = [f for name, f in vars(plotting).items() if name.startswith("plot_")]
    assert len(plots) >= 4
    assert not any(missing_annotations(plot) for plot in plots)
    assert missing_annotations(lambda x: x) == ["x", "return"]
