"""Look inside an LSTM that was trained on text, character by character.

Prints the units whose cell state is most selective for a feature of the text, such as
vowels or the position in a word. Writes plots, and an HTML report to explore.

    python examples/look_inside.py
    python examples/look_inside.py runs/time_machine/ScratchLSTMCell.keras
    python examples/look_inside.py model.keras --text its_text.txt --out runs/mine

Without a model, it trains a small one on the bundled short story. A model must start
with an Embedding of the characters of its training text, numbered by frequency.
"""

import sys
from pathlib import Path

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("look_inside.py", __doc__)
    add, positive_integer = parser.add_argument, common.positive_integer
    add("model", type=Path, nargs="?", help="a .keras file; omit to train a model")
    add("--text", type=Path, help="the training text of the model")
    add("--layer", help="the name of the LSTM, if the model has several")
    add("--characters", type=positive_integer, default=2000, help="characters to trace")
    add("--units", type=positive_integer, default=128, help="units of a new model")
    add("--epochs", type=positive_integer, default=40, help="for training")
    add("--seed", type=common.seed, default=2, help="for training")
    add("--out", type=Path, default=Path("runs/look_inside"), help="output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import keras
import numpy as np
from helpers import book_text
from time_machine import build_model

from keras_scratch_lstm import (
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    plotting,
    token_features,
    trace_gates,
)

LINE = 88  # characters per line of the plots


def main(argv=None):
    args = parse_arguments(argv)
    try:
        with common.lock(args.out):
            model, tokens, text = (encode if args.model else train)(args)
            tokens, text = tokens[: args.characters], text[: args.characters]
            trace = trace_gates(model, tokens[None], layer=args.layer)
            print(trace)
            write_report(trace, text, print_selective_units(trace, text), args.out)
    except (common.ExampleError, OSError, ValueError) as error:
        return f"look_inside.py: error: {str(error).splitlines()[0]}"
    print(f"HTML report: {args.out / 'gates.html'}")
    return 0


def train(args):
    """Trains a small model; returns it, and its text as integers and characters."""
    keras.utils.set_random_seed(args.seed)
    text = book_text.load_text(args.text or book_text.BUNDLED).characters
    vocabulary = book_text.Vocabulary(text)
    tokens = vocabulary.encode(text)
    lstm = ScratchLSTM(args.units, return_sequences=True, name="lstm")
    model = build_model(lstm, len(vocabulary), None, None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.005), loss, metrics=[Perplexity()])
    batches = book_text.Minibatches(tokens, 16, 64, "random", args.seed)
    model.fit(
        batches,
        epochs=args.epochs,
        steps_per_epoch=batches.steps_per_epoch,
        shuffle=False,
        verbose=0,
        callbacks=[PerplexityLogger()],
    )
    model.save(args.out / "model.keras")
    return model, tokens, text


def encode(args):
    """Loads a model; returns it, and its text as integers and characters."""
    model = keras.saving.load_model(args.model)
    text = book_text.load_text(args.text)
    known = getattr(model.layers[0], "input_dim", None)
    sizes = []
    for characters in (book_text.tokenize(text.characters), text.characters):
        vocabulary = book_text.Vocabulary(characters)
        if len(vocabulary) == known:
            return model, vocabulary.encode(characters), characters
        sizes.append(str(len(vocabulary)))
    raise common.ExampleError(
        f"The model must start with an Embedding of {' or '.join(sizes)} tokens, as in "
        f"{text.source}. Pass its training text by --text. Received: {known} tokens"
    )


def print_selective_units(trace, text, most=5):
    """Prints the units with the strongest correlations; returns their indices."""
    correlations = trace.correlate(token_features(text))
    names, r = list(correlations), np.nan_to_num(np.stack([*correlations.values()]))
    best = np.abs(r).argmax(axis=0)
    units = np.argsort(-np.abs(r).max(axis=0))[:most].tolist()
    for k in units:
        print(
            f"unit {k}: c correlates with {names[best[k]]} (r = {r[best[k], k]:+.2f})"
        )
    return units


def write_report(trace, text, units, out):
    line, page = slice(0, LINE), slice(0, 9 * LINE)
    plotting.plot_gates(
        trace, units=units[:3], tokens=text, steps=line, path=out / "gates.png"
    )
    plotting.plot_heatmap(
        trace, array="f", tokens=text, steps=line, path=out / "heatmap.png"
    )
    plotting.plot_saturation(trace, path=out / "saturation.png")
    plotting.plot_text(
        trace, unit=units[0], tokens=text, steps=page, path=out / "text.png"
    )
    trace.save(out / "trace.npz")
    trace.to_html(out / "gates.html", text)


if __name__ == "__main__":
    sys.exit(main())
