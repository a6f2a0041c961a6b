"""Train an LSTM on H. G. Wells's "The Time Machine", character by character.

The experiment of the book "Dive into Deep Learning"
(https://d2l.ai/chapter_recurrent-modern/lstm.html), through `model.fit`: once
with the `ScratchLSTMCell`, once with the built-in `LSTMCell`, once with the
`ScratchLSTM` layer, and on demand with the book's own from-scratch code.

    python examples/time_machine.py
    python examples/time_machine.py --cell scratch --epochs 50
    python examples/time_machine.py --compare-d2l --out runs/with_d2l
    python examples/time_machine.py --resume

Each finished epoch is saved. After whatever ended the run, `--resume` and the same
arguments go on from there, and end as if nothing had happened.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # room for the live line

import keras
import matplotlib
import numpy as np
from book_text import (
    Minibatches,
    TextError,
    Vocabulary,
    load_own_text,
    load_text,
    tokenize,
)
from checkpoint import Checkpoint, Checkpoints, FileError, replacing, set_aside
from matplotlib import pyplot as plt
from tqdm import tqdm

from keras_scratch_lstm import (
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    ScratchLSTMCell,
    __version__,
    trace_gates,
)

matplotlib.use("Agg")  # files only, no window


def in_rnn(cell):
    return lambda units, **run: keras.layers.RNN(cell(units), **run)


LAYERS = {
    "scratch": in_rnn(ScratchLSTMCell),
    "builtin": in_rnn(keras.layers.LSTMCell),
    "layer": ScratchLSTM,
}
PREFIXES = ("time traveller", "traveller")
PAGE_CHARACTERS = 2_000
CONTINUATION = 50  # characters
SAMPLES_A_RUN = 5
BACKEND = keras.backend.backend()


def main(argv=None):
    args = parse_arguments(argv)
    run_each_op_on_one_thread()
    try:
        return compare(args)
    except (TextError, ArgumentError, FileError) as error:
        return f"time_machine.py: error: {error}"


def compare(args):
    """Trains what is asked for, one after the other, and says how each went."""
    device = find_device(args.device)
    text = load_own_text(args.own_text) if args.own_text else load_text(args.text)
    tokens = tokenize(text.characters)
    vocabulary = Vocabulary(tokens)
    corpus = vocabulary.encode(tokens)[: args.max_tokens]
    batches = Minibatches(
        corpus, args.batch_size, args.num_steps, args.sampling, args.seed
    )
    trainers = dict.fromkeys(LAYERS if args.cell == "all" else [args.cell], train)
    if args.compare_d2l:
        trainers["d2l"] = functools.partial(
            import_d2l(), prefixes=PREFIXES, length=CONTINUATION
        )
    prepare_folder(args.out)
    origin = origin_of(args, vocabulary, corpus, device)
    checkpoints = prepare_checkpoints(args, list(trainers), origin)

    if not text.is_the_book:
        why = "as asked" if args.own_text else "as The Time Machine cannot be had here"
        print(
            f"The text is {text.source}, {why}: no numbers to compare with the book's."
        )
    if (BACKEND, args.sampling) == ("jax", "sequential") and args.cell != "layer":
        print(
            "On JAX, Keras's RNN carries no states in fit: with it, each minibatch of "
            "a cell starts at 0."
        )
    runs, failures = [], []
    interrupt = Interrupt()
    with interrupt, contextlib.suppress(KeyboardInterrupt):
        for name, trainer in trainers.items():
            if interrupt.requested:
                break
            run = {"cell": name, "backend": BACKEND, "device": device}
            run |= trainer(
                name, args, batches, vocabulary, device, interrupt, *checkpoints[name]
            )
            if run["failure"]:
                failures.append(f"{name}: {run['failure']}.")
            if run["epochs"]:
                run["text"] = {"source": text.source, "is_the_book": text.is_the_book}
                runs.append(sum_up(run, batches.tokens_per_epoch))
                write_report(runs, args.out)
    for run in runs:
        print(f"{run['cell']}: {run['closing_line']}")
        print(*(f"    {sample}" for sample in run["samples"].values()), sep="\n")
    if runs:
        print(f"Report: {args.out}")
    if interrupt.requested:
        finished = sum(run["epochs"] for run in runs)
        failures.append(f"Interrupted after {finished} finished epochs.")
    return "\n".join(failures) or 0


# --- one run -----------------------------------------------------------------


def build_model(layer, vocabulary_size, batch_size, num_steps):
    """One-hot characters, an LSTM, and the logits of the next character."""
    return keras.Sequential(
        [
            keras.Input(batch_shape=(batch_size, num_steps), dtype="int32"),
            # A frozen identity matrix: row k is the one-hot vector of token k.
            keras.layers.Embedding(
                vocabulary_size,
                vocabulary_size,
                embeddings_initializer="identity",
                trainable=False,
                name="one_hot",
            ),
            layer,
            keras.layers.Dense(vocabulary_size, name="logits"),
        ]
    )


def train(name, args, batches, vocabulary, device, interrupt, files, saved):
    """Trains one cell, from where it was saved on, and says how it went."""
    with device_scope(device):
        keras.utils.set_random_seed(args.seed)
        model = build_model(
            LAYERS[name](
                args.units,
                return_sequences=True,
                stateful=args.sampling == "sequential",
                name="rnn",
            ),
            len(vocabulary),
            args.batch_size,
            args.num_steps,
        )
        model.compile(
            # `global_clipnorm` is the book's clipping; `clipnorm` is by variable.
            optimizer=keras.optimizers.SGD(args.learning_rate, global_clipnorm=1.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[Perplexity()],
            steps_per_execution=steps_per_execution(batches.steps_per_epoch),
        )
        logger = PerplexityLogger(verbose=0)
        checkpoint = Checkpoint(files, model, logger, saved)
        progress = Progress(name, checkpoint.epochs, args.epochs, vocabulary)
        model.fit(
            batches.from_epoch(checkpoint.epochs),
            initial_epoch=checkpoint.epochs,
            epochs=args.epochs,
            steps_per_epoch=batches.steps_per_epoch,
            shuffle=False,
            verbose=0,
            callbacks=[logger, ResetStates(), checkpoint, progress, interrupt],
        )
        samples = {prefix: generate(model, vocabulary, prefix) for prefix in PREFIXES}
    if checkpoint.epochs:
        with replacing(args.out / f"{name}.keras") as path:
            model.save(path)
        with replacing(args.out / f"{name}.html") as path:
            write_page(model, vocabulary, batches.corpus, path, name)
    return {
        "epochs": checkpoint.epochs,
        "failure": checkpoint.failure,  # a sentence, or None
        "seconds": checkpoint.seconds,
        "samples": samples,
        "history": checkpoint.history,
    }


def sum_up(run, tokens_per_epoch):
    """Adds the numbers of the whole run, and the book's closing line."""
    perplexity = run["history"]["perplexity"][-1]
    speed = run["epochs"] * tokens_per_epoch / run["seconds"]
    line = f"perplexity {perplexity:.1f}, {speed:.1f} tokens/sec on {run['device']}"
    return {
        **run,
        "perplexity": perplexity,
        "tokens_per_sec": speed,
        "closing_line": line,
    }


def write_page(model, vocabulary, corpus, path, name):
    """What the gates do over the first characters of the text."""
    tokens = corpus[:PAGE_CHARACTERS]
    inputs = model.get_layer("one_hot")(tokens[None])
    # The model has minibatches of one size only; its cell reads what it is given.
    rnn = keras.layers.RNN(model.get_layer("rnn").cell, name=name)
    rnn.build(inputs.shape)
    trace = trace_gates(rnn, inputs)
    trace.to_html(path, vocabulary.decode(tokens))


def generate(model, vocabulary, prefix, length=CONTINUATION):
    """Continues `prefix`, each time with the likeliest character."""
    one_hot, cell = model.get_layer("one_hot"), model.get_layer("rnn").cell
    logits = model.get_layer("logits")
    tokens = list(vocabulary.encode(prefix))
    states = cell.get_initial_state(batch_size=1)
    for step in range(len(prefix) + length - 1):
        h, states = cell(one_hot(np.array([tokens[step]])), states)
        if step >= len(prefix) - 1:
            tokens.append(int(keras.ops.argmax(logits(h)[0])))
    return prefix + vocabulary.decode(tokens[len(prefix) :])


def steps_per_execution(steps_per_epoch):
    """Steps that one call from Python runs; fewer calls leave more time to train."""
    if BACKEND == "torch":
        return 1  # all that Keras allows there
    return max(k for k in range(1, 11) if steps_per_epoch % k == 0)


class ResetStates(keras.callbacks.Callback):
    """Starts each epoch with the states at zero."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.get_layer("rnn").reset_state()


class Progress(keras.callbacks.Callback):
    """One live line, and now and then what the model writes."""

    def __init__(self, name, finished, epochs, vocabulary):
        super().__init__()
        self._bar = tqdm(initial=finished, total=epochs, desc=name, unit="epoch")
        self._every = max(1, epochs // SAMPLES_A_RUN)
        self._vocabulary = vocabulary

    def on_epoch_end(self, epoch, logs=None):
        perplexity, speed = logs["perplexity"], logs["tokens_per_sec"]
        self._bar.set_postfix_str(
            f"perplexity {perplexity:.2f}, {speed:,.0f} tokens/s", refresh=False
        )
        self._bar.update()
        if (epoch + 1) % self._every == 0:
            sample = generate(self.model, self._vocabulary, PREFIXES[0])
            self._bar.write(f"epoch {epoch + 1}: {sample}")

    def on_train_end(self, logs=None):
        self._bar.close()


class Interrupt(keras.callbacks.Callback):
    """Ctrl-C ends the run after the epoch under way; a second one at once."""

    requested = False

    def __enter__(self):
        self._previous = signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, signal_number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_epoch_end(self, epoch, logs=None):
        if self.requested:
            self.model.stop_training = True


# --- the machine -------------------------------------------------------------


def run_each_op_on_one_thread():
    """Lets TensorFlow spread the ops of a step over the cores, not each op.

    The matrix products of one time step are too small to be worth cutting up.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # Too late once TensorFlow is running, which is no harm.
        with contextlib.suppress(RuntimeError):
            tf.config.threading.set_intra_op_parallelism_threads(1)


def find_device(wanted):
    """The device to train on, as `"/CPU:0"`; a GPU where there is one."""
    if BACKEND == "torch":
        import torch

        devices = [f"gpu:{k}" for k in range(torch.cuda.device_count())] + ["cpu:0"]
    else:
        list_devices = keras.distribution.list_devices
        devices = sorted({*list_devices(), *list_devices("cpu")})
        devices.sort(key=lambda device: not device.startswith("gpu"))
    if wanted is None:
        return "/" + devices[0].upper()
    name = wanted.strip("/").lower().removeprefix("device:")
    name = name if ":" in name else f"{name}:0"
    if name not in devices:
        names = ", ".join("/" + device.upper() for device in devices)
        raise ArgumentError(
            f"--device is {wanted!r}; expected one that {BACKEND} has here: {names}."
        )
    return "/" + name.upper()


def device_scope(device):
    """The backend's way to put all that follows on one device."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.distribute.OneDeviceStrategy(device).scope()
    # Keras on torch must not be told the index of the one CPU.
    return keras.device(device.strip("/").lower().replace("cpu:0", "cpu"))


def import_d2l():
    if BACKEND != "tensorflow":
        raise ArgumentError(
            f"--compare-d2l runs on the tensorflow backend, and this is {BACKEND}."
        )
    try:
        from d2l_lstm import train_d2l
    except ImportError as error:
        raise ArgumentError(
            f"--compare-d2l needs d2l ({error}): "
            'run `pip install -e ".[examples,d2l]"`.'
        ) from None
    return train_d2l


# --- the report --------------------------------------------------------------


def write_report(runs, out):
    """Writes the numbers, the curves and the picture of the runs so far."""
    results = [{k: v for k, v in run.items() if k != "history"} for run in runs]
    with replacing(out / "results.json") as path:
        path.write_text(json.dumps({"runs": results}, indent=2) + "\n")
    with replacing(out / "history.csv") as path, open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "epoch", "perplexity", "tokens_per_sec"])
        for run in runs:
            logs = run["history"]
            curves = zip(logs["perplexity"], logs["tokens_per_sec"], strict=True)
            writer.writerows(
                [run["cell"], epoch, *values] for epoch, values in enumerate(curves, 1)
            )
    draw(runs, out)


def draw(runs, out):
    """Perplexity against epoch; `perplexity.png` and `.svg`."""
    # Okabe and Ito's colours, which the colour-blind can tell apart. The cells
    # start from the same weights, so one curve may lie on the other.
    styles = {
        "scratch": {"color": "#0072B2", "linewidth": 3.5},
        "builtin": {"color": "#E69F00", "linewidth": 1.5, "linestyle": "--"},
        "layer": {"color": "#CC79A7", "linewidth": 1.5, "linestyle": ":"},
        "d2l": {"color": "#009E73", "linewidth": 1.5},
    }
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        perplexity = run["history"]["perplexity"]
        epochs = range(1, len(perplexity) + 1)
        ax.plot(epochs, perplexity, label=run["cell"], **styles[run["cell"]])
    ax.set_yscale("log")
    highest = max(max(run["history"]["perplexity"]) for run in runs)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50) if tick < highest] or [1]
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="epoch", ylabel="perplexity (log scale)")
    book = all(run["text"]["is_the_book"] for run in runs)
    ax.set_title("The Time Machine" if book else "Not the book's text", loc="left")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="cell", frameon=False)
    for suffix in ("png", "svg"):
        with replacing(out / f"perplexity.{suffix}") as path:
            figure.savefig(path, dpi=150)
    plt.close(figure)


# --- the command line --------------------------------------------------------


class ArgumentError(Exception):
    """An argument that cannot be met; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(argv):
    parser = Parser(
        prog="time_machine.py",
        description='Train an LSTM on "The Time Machine", character by character.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cell", choices=[*LAYERS, "all"], default="all", help="what to train")
    add("--epochs", type=positive_integer, default=500, help="passes over the text")
    add("--units", type=positive_integer, default=256, help="size of h and of c")
    add("--batch-size", type=positive_integer, default=32, help="sequences at a time")
    add("--num-steps", type=positive_integer, default=35, help="characters of each")
    add("--learning-rate", type=positive_number, default=1.0, help="of plain SGD")
    add(
        "--max-tokens", type=positive_integer, default=10_000, help="length of the text"
    )
    add(
        "--sampling",
        choices=["sequential", "random"],
        default="sequential",
        help="whether a minibatch goes on where the last one ended",
    )
    add("--device", help="such as /CPU:0; by default a GPU if there is one")
    add("--seed", type=natural_number, default=2, help="of weights and offsets")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, help="where timemachine.txt lies")
    source.add_argument("--own-text", type=Path, help="any other text to train on")
    add("--out", type=Path, default=Path("runs/time_machine"), help="folder to fill")
    add(
        "--resume",
        action="store_true",
        help="go on from the last finished epochs in --out; the other arguments as "
        "before, but --epochs may grow",
    )
    add("--compare-d2l", action="store_true", help="train the book's own code too")
    return parser.parse_args(argv)


def positive_integer(argument):
    return _number(argument, int, lambda value: value > 0, "a positive integer")


def natural_number(argument):
    return _number(
        argument,
        int,
        lambda value: 0 <= value < 2**32,
        "an integer from 0 to 2**32 - 1",
    )


def positive_number(argument):
    return _number(argument, float, lambda value: 0 < value < math.inf, "above 0")


def _number(argument, kind, fits, expected):
    with contextlib.suppress(ValueError):
        if fits(value := kind(argument)):
            return value
    raise argparse.ArgumentTypeError(f"{argument!r} came; expected {expected}.")


def prepare_folder(out):
    """Makes sure that the report can be written before anything is trained."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ArgumentError(
            f"--out {out} cannot be written: {error.strerror}."
        ) from None


def origin_of(args, vocabulary, corpus, device):
    """All that decides what an epoch does: a checkpoint is of use for the same only."""
    names = ("units", "batch_size", "num_steps", "learning_rate", "sampling", "seed")
    text = repr(vocabulary.tokens).encode() + corpus.tobytes()
    digest = hashlib.sha256(text).hexdigest()
    package = importlib.import_module(BACKEND)
    return {
        **{name: getattr(args, name) for name in names},
        "text": f"{len(corpus)} characters, SHA-256 {digest}",
        "device": device,
        "backend": f"{BACKEND} {package.__version__}",
        "keras": keras.__version__,
        "keras_scratch_lstm": __version__,
    }


def prepare_checkpoints(args, names, origin):
    """For each run, where its checkpoints go, and the one to go on from, if any."""
    folder = args.out / "checkpoints"
    if folder.exists() and not args.resume:
        aside = set_aside(folder)
        print(f"The run starts afresh; checkpoints of an earlier one are in {aside}.")
    checkpoints = {}
    for name in names:
        files = Checkpoints(folder, name, origin)
        saved = files.load()
        if saved and saved.epochs > args.epochs:
            raise ArgumentError(
                f"--epochs is {args.epochs}, but {saved.epochs} of {name} are finished."
            )
        checkpoints[name] = files, saved
    if args.resume:
        finished = {
            name: saved.epochs for name, (_, saved) in checkpoints.items() if saved
        }
        print("Resumed:", finished or "nothing is finished, so all starts afresh")
    prepare_folder(folder)
    return checkpoints


if __name__ == "__main__":
    sys.exit(main())
