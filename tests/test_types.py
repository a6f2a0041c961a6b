"""Every public function is annotated; mypy checks the annotations."""

import inspect

import pytest

import keras_scratch_lstm

pytestmark = pytest.mark.one_backend


def functions(thing):
    """A function, or the public methods and properties that a class defines."""
    if not inspect.isclass(thing):
        return [thing]
    members = [
        getattr(value, "fget", getattr(value, "__func__", value))
        for name, value in vars(thing).items()
        if name == "__init__" or name[0] != "_"
    ]
    return filter(inspect.isfunction, members)


def missing_annotations(function):
    signature = inspect.signature(function)
    missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    missing += ["return"] * (signature.return_annotation is signature.empty)
    return sorted(set(missing) - {"self", "cls"})


def test_public_functions_are_annotated():
    plotting = pytest.importorskip("keras_scratch_lstm.plotting")
    public = [getattr(keras_scratch_lstm, name) for name in keras_scratch_lstm.__all__]
    public += [f for name, f in vars(plotting).items() if name.startswith("plot_")]
    assert len(public) > 15
    missing = [
        (f, missing_annotations(f)) for thing in public for f in functions(thing)
    ]
    assert [row for row in missing if row[1]] == []
    assert missing_annotations(lambda x: x) == ["return", "x"]
