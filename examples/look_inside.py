"""Look into an LSTM that was trained on text, character by character.

Prints the units whose memory follows something that has a name, such as vowels
or the place within a word, and writes pictures, and a page to explore the gates.

    python examples/look_inside.py
    python examples/look_inside.py runs/time_machine/scratch.keras
    python examples/look_inside.py model.keras --text its_text.txt --out runs/mine

Without a model, it trains a small one, on a short story of ours. A model must
take integer tokens, characters of the text that it was trained on, numbered as
`time_machine.py` numbers them.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from book_text import (
    BUNDLED,
    Minibatches,
    TextError,
    Vocabulary,
    load_own_text,
    load_text,
    tokenize,
)

from keras_scratch_lstm import (
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    trace_gates,
)
from keras_scratch_lstm.plotting import (
    plot_gates,
    plot_heatmap,
    plot_saturation,
    plot_text,
)

MOST_SELECTIVE = 5
IN_A_PICTURE = 88  # characters in a line


def main(argv=None):
    args = parse_arguments(argv)
    try:
        prepare_folder(args.out)
        if args.model is None:
            model, tokens, characters = train(args)
        else:
            model = load(args.model)
            tokens, characters = encode(model, args.text)
        tokens, characters = tokens[: args.characters], characters[: args.characters]
        trace = trace_text(model, tokens, args.layer)
    except (TextError, ArgumentError, ValueError) as error:
        return f"look_inside.py: error: {error}"

    print(trace)
    found = find_selective(trace.c[0], classes_of(characters))
    for one in found:
        print(f"unit {one.unit}: the memory follows {one.what} (r = {one.r:+.2f})")
    draw(trace, characters, [one.unit for one in found], args.out)
    trace.save(args.out / "trace.npz")
    trace.to_html(args.out / "gates.html", characters)
    print(f"To explore: {args.out / 'gates.html'}")
    return 0


# --- the model ---------------------------------------------------------------


def train(args):
    """A small model, its text's tokens, and the characters that they stand for."""
    keras.utils.set_random_seed(args.seed)
    characters = load_own_text(args.text or BUNDLED).characters
    vocabulary = Vocabulary(characters)
    tokens = vocabulary.encode(characters)
    size = len(vocabulary)
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            # A frozen identity matrix: row k is the one-hot vector of token k.
            keras.layers.Embedding(
                size, size, embeddings_initializer="identity", trainable=False
            ),
            ScratchLSTM(args.units, return_sequences=True, name="lstm"),
            keras.layers.Dense(size, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss, metrics=[Perplexity()])
    batches = Minibatches(tokens, 16, 64, "random", args.seed)
    model.fit(
        batches,
        epochs=args.epochs,
        steps_per_epoch=batches.steps_per_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[PerplexityLogger()],
    )
    model.save(args.out / "model.keras")
    return model, tokens, characters


def load(path):
    try:
        model = keras.saving.load_model(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"{path} cannot be loaded: {reason}") from None
    if not isinstance(model.layers[0], keras.layers.Embedding):
        raise ArgumentError(
            f"{path} begins with a {type(model.layers[0]).__name__} layer; expected "
            "an Embedding of characters."
        )
    return model


def encode(model, path):
    """The text's tokens, cut as in the book or as it stands, as the model has them."""
    text = load_own_text(path) if path else load_text()
    known = model.layers[0].input_dim
    sizes = []
    for characters in (tokenize(text.characters), list(text.characters)):
        vocabulary = Vocabulary(characters)
        if len(vocabulary) == known:
            return vocabulary.encode(characters), characters
        sizes.append(len(vocabulary))
    raise ArgumentError(
        f"the model knows {known} tokens, and {text.source} has {sizes[0]} in lower "
        f"case and {sizes[1]} as it stands; expected the text that it was trained on, "
        "with --text."
    )


def trace_text(model, tokens, layer):
    """The gates over one long text.

    A model that was trained on minibatches of one fixed shape takes no other. Of
    such a one, the cell is put into a layer of its own.
    """
    if tuple(model.input_shape) == (None, None):
        return trace_gates(model, tokens[None], layer)
    cells = {each.name: each.cell for each in model.layers if hasattr(each, "cell")}
    if len(cells) != 1:
        raise ArgumentError(
            f"the model takes inputs of shape {model.input_shape} alone, and has "
            f"{len(cells)} recurrent layers; expected one, or a shape of (None, None)."
        )
    one_hot = model.layers[0](tokens[None])
    ((name, cell),) = cells.items()
    rnn = keras.layers.RNN(cell, name=name)
    rnn.build(one_hot.shape)
    return trace_gates(rnn, one_hot, layer and rnn)


# --- what a unit follows -----------------------------------------------------


class Selective(NamedTuple):
    """A unit, what it follows most closely, and the correlation."""

    unit: int
    what: str
    r: float


def classes_of(characters):
    """What there is to follow in a text: a number for each character."""
    characters = np.array(list(characters))
    space = np.char.isspace(characters)
    starts = np.append(True, space[:-1]) & ~space
    line_starts = np.append(True, characters[:-1] == "\n")
    step = np.arange(len(characters))

    def since(event):
        return step - np.maximum.accumulate(np.where(event, step, -1))

    return {
        "spaces": space,
        "starts of words": starts,
        "the place in the word": since(space),
        "the place in the line": since(line_starts),
        "vowels": np.isin(np.char.lower(characters), list("aeiouy")),
        "capitals": np.char.isupper(characters),
        "digits": np.char.isdigit(characters),
        "punctuation": ~np.char.isalnum(characters) & ~space,
        "quotations": np.cumsum(np.isin(characters, list('"“”'))) % 2,
    }


def find_selective(values, classes, most=MOST_SELECTIVE):
    """The units that follow some class most closely; `values` is (time, units)."""

    def standardize(x):
        x = x - x.mean(axis=0)
        norm = np.sqrt((x**2).sum(axis=0))
        return x / np.where(norm > 1e-6, norm, np.inf)  # the same all along

    names = list(classes)
    targets = np.stack([classes[name] for name in names], axis=-1).astype("float64")
    r = standardize(values.astype("float64")).T @ standardize(targets)
    best = np.abs(r).argmax(axis=1)
    order = np.argsort(-np.abs(r).max(axis=1))[:most]
    return [
        Selective(int(k), names[best[k]], float(r[k, best[k]])) for k in order.tolist()
    ]


def draw(trace, characters, units, out):
    line = slice(0, IN_A_PICTURE)
    plot_gates(trace, units[:3], characters, steps=line, path=out / "gates.png")
    plot_heatmap(trace, "f", characters, steps=line, path=out / "heatmap.png")
    plot_saturation(trace, path=out / "saturation.png")
    text = slice(0, 9 * IN_A_PICTURE)
    plot_text(trace, units[0], characters, steps=text, path=out / "text.png")


# --- the command line --------------------------------------------------------


class ArgumentError(Exception):
    """An argument that cannot be met; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(argv):
    parser = Parser(
        prog="look_inside.py",
        description="Look into an LSTM that was trained on text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="a .keras file; by default, train one")
    add(
        "--text", type=Path, help="the text that the model was, or is to be, trained on"
    )
    add("--layer", help="the name of the LSTM, where the model has several")
    add(
        "--characters", type=positive_integer, default=2000, help="of the text to trace"
    )
    add("--units", type=positive_integer, default=128, help="of the model to train")
    add("--epochs", type=positive_integer, default=40, help="of training")
    add("--seed", type=int, default=2, help="of training")
    add("--out", type=Path, default=Path("runs/look_inside"), help="folder to fill")
    return parser.parse_args(argv)


def positive_integer(argument):
    if not argument.isdecimal() or int(argument) < 1:
        raise argparse.ArgumentTypeError(
            f"{argument!r} came; expected a positive integer."
        )
    return int(argument)


def prepare_folder(out):
    """Makes sure that the pictures can be written before anything is trained."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ArgumentError(
            f"--out {out} cannot be written: {error.strerror}."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
