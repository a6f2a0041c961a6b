import sys

import keras
import numpy as np
import pytest
from keras import ops
from models import BATCH, FEATURES, TIME, UNITS, classifier, make

from keras_scratch_lstm import Edit, ablate_units, run_with_edits


def mse(y_true, y_pred):
    return ops.mean((y_true - y_pred) ** 2)


@pytest.fixture
def y(rng):
    return rng.normal(size=(BATCH, 3)).astype("float32")


def loss_under(model, x, y, *edits):
    outputs, _ = run_with_edits(model, x, edits=edits)
    return np.mean((outputs - y) ** 2)


def test_silencing_equals_zeroing_the_weights_that_read_the_unit(x, y):
    model = classifier(make("ScratchLSTM"))
    ablation = ablate_units(model, x, y, loss=mse, verbose=0)
    weights = model.get_weights()
    cell, dense = model.layers[0].cell, model.layers[1]
    readers = [getattr(cell, f"W_h{gate}") for gate in "ifoc"] + [dense.kernel]
    for unit in range(UNITS):
        for weight in readers:
            value = ops.convert_to_numpy(weight).copy()
            value[unit] = 0
            weight.assign(value)
        expected = np.mean((ops.convert_to_numpy(model(x)) - y) ** 2)
        assert ablation.loss[unit] == pytest.approx(expected, rel=1e-5)
        model.set_weights(weights)
    assert np.abs(ablation.change).max() > 1e-3


@pytest.mark.parametrize(("method", "batch_size"), [("zero", 1), ("mean", 7)])
@pytest.mark.ci
def test_rows_equal_one_run_for_each(method, batch_size, x, y):
    model = classifier(make("LSTM"))
    model.compile(loss="mse")
    arrays, units = ["f", "h"], [3, 1, 2]
    options = {"method": method, "batch_size": batch_size, "verbose": 0}
    ablation = ablate_units(model, x, y, arrays=arrays, units=units, **options)
    _, trace = run_with_edits(model, x, edits=[])
    rows = [(array, unit) for array in arrays for unit in units]
    assert list(zip(ablation.array, ablation.unit, strict=True)) == rows
    assert ablation.baseline == pytest.approx(loss_under(model, x, y), rel=1e-5)
    for (array, unit), value in zip(rows, ablation.loss, strict=True):
        mean = getattr(trace, array)[..., unit].mean()
        edit = Edit(array, mean if method == "mean" else 0.0, units=unit)
        assert value == pytest.approx(loss_under(model, x, y, edit), rel=1e-4)


def test_models_with_a_fixed_batch_size(x, y):
    layer = make("ScratchLSTM", stateful=True)
    model = classifier(layer, batch_size=BATCH)
    accuracy = keras.metrics.MeanAbsoluteError()
    ablation = ablate_units(model, x, y, loss=accuracy, verbose=0)
    for unit in range(UNITS):
        outputs, _ = run_with_edits(model, x, edits=Edit("h", 0.0, units=unit))
        expected = np.abs(outputs - y).mean()
        assert ablation.loss[unit] == pytest.approx(expected, rel=1e-5)


def test_interrupt_keeps_the_rows_that_are_done(x, y):
    calls = []

    def metric(y_true, y_pred):
        calls.extend([1] * (len(y_true) == BATCH))  # all samples
        if len(calls) == 4:
            raise KeyboardInterrupt
        return mse(y_true, y_pred)

    model = classifier(make("LSTM"))
    ablation = ablate_units(model, x, y, loss=metric, batch_size=BATCH, verbose=0)
    complete = ablate_units(model, x, y, loss=mse, verbose=0)
    assert ablation.unit.tolist() == [0, 1]
    np.testing.assert_allclose(ablation.loss, complete.loss[:2], rtol=1e-5)


@pytest.mark.parametrize("loss", [None, "mse", "metric"])
def test_masked_outputs_do_not_count(loss, x, rng):
    x[:, TIME - 2 :] = 0
    x[1, 3:] = 0
    y = rng.normal(size=(BATCH, TIME, 3)).astype("float32")
    y[(x == 0).all(-1)] = 100  # what nobody reads
    layers = classifier(make("LSTM", return_sequences=True)).layers
    masking = keras.layers.Masking()
    model = keras.Sequential([keras.Input((TIME, FEATURES)), masking, *layers])
    cell, dense = layers[0].cell, layers[1]
    for weight in (cell.recurrent_kernel, dense.kernel):
        value = ops.convert_to_numpy(weight).copy()
        value[2] = 0
        weight.assign(value)
    model.compile(loss="mse")
    if loss == "metric":
        loss = keras.metrics.MeanSquaredError()
    ablation = ablate_units(model, x, y, loss=loss, verbose=0)
    outputs = ops.convert_to_numpy(model(x))
    expected = np.mean((outputs - y)[(x != 0).any(-1)] ** 2)
    assert ablation.baseline == pytest.approx(expected, rel=1e-5)
    assert ablation.loss[2] == pytest.approx(expected, rel=1e-5)
    assert (ablation.loss < 100).all()


def test_bidirectional_layers_and_datasets(x, y):
    both = keras.layers.Bidirectional(make("LSTM"))
    model = classifier(both)
    ablation = ablate_units(model, x, y, loss="mse", verbose=0)
    names = both.forward_layer.name, both.backward_layer.name
    assert ablation.layer.tolist() == [name for name in names for _ in range(UNITS)]
    for layer, losses in zip(names, np.split(ablation.loss, 2), strict=True):
        alone = ablate_units(model, x, y, loss="mse", layer=layer, verbose=0)
        np.testing.assert_allclose(alone.loss, losses, rtol=1e-5)
    dataset = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = ablate_units(model, iter(dataset), loss="mse", verbose=0)
    np.testing.assert_allclose(found.loss, ablation.loss, rtol=1e-5)
    with pytest.raises(ValueError, match="`targets` must be None for a dataset"):
        ablate_units(model, iter(dataset), y, loss="mse", verbose=0)
    with pytest.raises(ValueError, match="`targets` must be arrays"):
        ablate_units(model, x, loss="mse", verbose=0)


@pytest.mark.parametrize("samples", [40, 1])
@pytest.mark.ci
def test_error_is_that_of_groups_of_samples(samples, draw):
    model = classifier(make("LSTM"))
    x, y = draw(samples, TIME, FEATURES), draw(samples, 3)
    ablation = ablate_units(model, x, y, loss="mse", units=[1, 2], verbose=0)
    if samples == 1:
        assert np.isnan(ablation.error).all()
        return
    before = model.predict(x, verbose=0)
    for unit, error in zip(ablation.unit, ablation.error, strict=True):
        outputs, _ = run_with_edits(model, x, edits=Edit("h", 0.0, units=unit))
        change = ((outputs - y) ** 2 - (before - y) ** 2).mean(axis=1)
        groups = np.reshape(change, (min(samples, 20), -1)).mean(axis=1)
        expected = groups.std(ddof=1) / len(groups) ** 0.5
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.one_backend
def test_table_and_progress(x, y, capsys, monkeypatch):
    pytest.importorskip("pandas")
    ablation = ablate_units(classifier(make("LSTM")), x, y, loss="mse")
    assert f"{UNITS}/{UNITS}" in capsys.readouterr().out
    frame = ablation.to_dataframe()
    assert list(frame.columns) == ["layer", "array", "unit", "loss", "change", "error"]
    np.testing.assert_array_equal(frame["change"], ablation.loss - ablation.baseline)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="`to_dataframe` needs pandas: run `pip in"):
        ablation.to_dataframe()


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`loss` must be given, since .* is not compiled"),
        ({"loss": "accuracy"}, "`loss` must be the name of a Keras loss, or a f"),
        ({"loss": "mse", "arrays": "g"}, "`arrays` must be among 'i', 'f'"),
        ({"loss": "mse", "arrays": []}, "`arrays` must be among"),
        ({"loss": "mse", "units": UNITS}, "`units` must be .* selects some of 4"),
        ({"loss": "mse", "method": "noise"}, "`method` must be 'zero' or 'mean'"),
        ({"loss": "mse", "batch_size": 0}, "`batch_size` must be a positive integer"),
    ],
)
def test_invalid_arguments(options, message, x, y):
    with pytest.raises(ValueError, match=message):
        ablate_units(classifier(make("LSTM")), x, y, verbose=0, **options)
