"""The report of `time_machine.py`: results, curves and plot."""

import csv
import json
import statistics

import keras
import matplotlib
from helpers.common import replacing
from helpers.devices import normalize
from matplotlib import pyplot as plt

matplotlib.use("Agg")  # no window

STYLES = {  # Okabe and Ito's palette, safe for color-blind readers
    "ScratchLSTMCell": {"color": "#0072B2", "linewidth": 3.5},
    "LSTMCell": {"color": "#E69F00", "linestyle": "--"},
    "ScratchLSTM": {"color": "#CC79A7", "linestyle": ":"},
    "d2l": {"color": "#009E73"},
}


def summarize(name, checkpoint, samples, text, batches):
    """Returns the results of one layer, with the book's closing line."""
    history, tokens = checkpoint.history, batches.tokens_per_epoch
    seconds = sum(tokens / rate for rate in history["tokens_per_sec"])
    speed = checkpoint.epochs * tokens / seconds
    perplexity, device = history["perplexity"][-1], str(checkpoint.device)
    line = f"perplexity {perplexity:.1f}, {speed:.1f} tokens/sec"
    line += f" on /{normalize(device).upper()}"
    return {
        "layer": name,
        "backend": keras.backend.backend(),
        "device": device,
        "text": {"source": text.source, "is_the_book": text.is_the_book},
        "epochs": checkpoint.epochs,
        "failure": checkpoint.failure,
        "perplexity": perplexity,
        # Of the last 50 epochs: at a learning rate of 1.0, single epochs stand out.
        "median_perplexity": statistics.median(history["perplexity"][-50:]),
        "tokens_per_sec": speed,
        "seconds": seconds,
        "closing_line": line,
        "samples": samples,
        "history": history,
    }


def write_report(runs, out):
    """Writes `results.json`, `history.csv` and the plot of the layers so far."""
    results = [{k: v for k, v in run.items() if k != "history"} for run in runs]
    with replacing(out / "results.json") as path:
        path.write_text(json.dumps({"runs": results}, indent=2) + "\n")
    with replacing(out / "history.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "epoch", "perplexity", "tokens_per_sec"])
        for run in runs:
            logs = run["history"]
            curves = zip(logs["perplexity"], logs["tokens_per_sec"], strict=True)
            writer.writerows([run["layer"], k, *row] for k, row in enumerate(curves, 1))
    figure = plot_perplexity(runs)
    for suffix in ("png", "svg"):
        with replacing(out / f"perplexity.{suffix}") as path:
            figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_perplexity(runs):
    """Returns a figure of perplexity against epochs."""
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        perplexity = run["history"]["perplexity"]
        epochs = range(1, len(perplexity) + 1)
        ax.plot(epochs, perplexity, label=run["layer"], **STYLES[run["layer"]])
    ax.set_yscale("log")
    highest = max(max(run["history"]["perplexity"]) for run in runs)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick < highest] or [1]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    book = all(run["text"]["is_the_book"] for run in runs)
    ax.set_title("The Time Machine" if book else "Not the book's text", loc="left")
    ax.set(xlabel="epoch", ylabel="perplexity (log scale)")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure
