"""Train an LSTM on H. G. Wells's "The Time Machine", character by character.

The experiment of "Dive into Deep Learning", by `model.fit` under a device strategy:
https://d2l.ai/chapter_recurrent-modern/lstm.html

    python examples/time_machine.py --quick         # readable text in two minutes
    python examples/time_machine.py                 # 500 epochs, as in the book
    python examples/time_machine.py --compare-d2l   # also train the book's own code
    python examples/time_machine.py --resume        # continue an interrupted run
    python examples/time_machine.py --device cpu:0  # on TensorFlow: OneDeviceStrategy

A resumed run gives the same weights, bit for bit, as an uninterrupted one.
"""

from helpers import common


def parse_arguments(argv=None):
    parser = common.create_parser("time_machine.py", __doc__)
    choices = ["ScratchLSTMCell", "LSTMCell", "ScratchLSTM", "all"]
    parser.add_argument("--layer", choices=choices, default="all", help="what to train")
    common.add_training_options(parser, "runs/time_machine", "sequential")
    text = "continue the run in --out; pass the same options, or more --epochs"
    parser.add_argument("--resume", action="store_true", help=text)
    text = "such as cpu:0 or /GPU:0; if omitted, the first GPU, or else the CPU"
    parser.add_argument("--device", help=text)
    one_of = parser.add_mutually_exclusive_group()  # as the book's code has no Adam
    text = "60 epochs of Adam at 0.005, for readable text soon"
    one_of.add_argument("--quick", action="store_true", help=text)
    text = "also train the book's own code, which --resume trains again"
    one_of.add_argument("--compare-d2l", action="store_true", help=text)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(epochs=60, learning_rate=0.005)
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # Answer --help before the imports below, which take seconds.
    common.load_keras()

import contextlib
import hashlib

import keras
import numpy as np
from helpers.book_text import PREFIXES, Minibatches, Vocabulary, load_text, tokenize
from helpers.devices import find_device
from helpers.report import summarize, write_report
from helpers.resume import Checkpoint, Interrupt, checkpoints, prepare
from tqdm import tqdm

from keras_scratch_lstm import (
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    ScratchLSTMCell,
    trace_gates,
)

BACKEND = keras.backend.backend()
TRACED_TOKENS = 2_000

# --- data --------------------------------------------------------------------


def load_data(args):
    """Returns the text, its vocabulary, and the minibatches."""
    text = load_text(args.text)
    tokens = tokenize(text.characters)
    vocabulary = Vocabulary(tokens)
    corpus = vocabulary.encode(tokens)[: args.max_tokens]
    size = args.batch_size, args.num_steps
    return text, vocabulary, Minibatches(corpus, *size, args.sampling, args.seed)


# --- model -------------------------------------------------------------------


def in_rnn(cell_class):
    return lambda units, **options: keras.layers.RNN(cell_class(units), **options)


LAYERS = {
    "ScratchLSTMCell": in_rnn(ScratchLSTMCell),
    "LSTMCell": in_rnn(keras.layers.LSTMCell),
    "ScratchLSTM": ScratchLSTM,
}


def build_model(layer, vocabulary_size, batch_size, num_steps):
    """Returns a model of one-hot characters, an LSTM, and next-character logits."""
    one_hot = keras.layers.Embedding(
        vocabulary_size,
        vocabulary_size,
        embeddings_initializer="identity",  # row k is the one-hot vector of token k
        trainable=False,
        name="one_hot",
    )
    inputs = keras.Input(batch_shape=(batch_size, num_steps), dtype="int32")
    logits = keras.layers.Dense(vocabulary_size, name="logits")
    return keras.Sequential([inputs, one_hot, layer, logits])


def create_model(name, args, vocabulary, optimizer=keras.optimizers.SGD, **options):
    """Returns a compiled model with one of `LAYERS`."""
    keras.utils.set_random_seed(args.seed)
    units, stateful = args.units, args.sampling == "sequential"
    layer = LAYERS[name](units, return_sequences=True, stateful=stateful, name="rnn")
    batch_size = args.batch_size if stateful else None
    model = build_model(layer, len(vocabulary), batch_size, args.num_steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # The book clips the norm of all gradients; `clipnorm` is per variable.
    optimizer = optimizer(args.learning_rate, global_clipnorm=1.0)
    model.compile(optimizer, loss, metrics=[Perplexity()], **options)
    return model


# --- training ----------------------------------------------------------------


def device_scope(device):
    """Returns a context in which models are created, compiled and fit on a device."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.distribute.OneDeviceStrategy(device).scope()
    return keras.device(device.replace("cpu:0", "cpu"))  # as torch names it


def train(name, args, vocabulary, batches, interrupt):
    """Trains a model and saves it; returns the `Checkpoint` and generated texts."""
    steps = batches.steps_per_epoch
    # Several steps per call from Python save time. Keras on torch allows only one.
    choices = range(1, 2 if BACKEND == "torch" else 11)
    per_call = max(count for count in choices if steps % count == 0)
    optimizer = keras.optimizers.Adam if args.quick else keras.optimizers.SGD
    options = {"optimizer": optimizer, "steps_per_execution": per_call}
    with device_scope(args.device):
        model = create_model(name, args, vocabulary, **options)
        checkpoint = Checkpoint(args.out / "checkpoints", name, model)
        progress = Progress(name, checkpoint.epochs, args.epochs, vocabulary)
        logger = PerplexityLogger(verbose=0)
        batches.first_epoch = checkpoint.epochs
        model.fit(
            batches,
            initial_epoch=checkpoint.epochs,
            epochs=args.epochs,
            steps_per_epoch=steps,
            shuffle=False,
            verbose=0,
            callbacks=[logger, ResetStates(), checkpoint, progress, interrupt],
        )
    if checkpoint.epochs:
        with common.replacing(args.out / f"{name}.keras") as path:
            model.save(path)
        tokens = batches.corpus[:TRACED_TOKENS]
        model.get_layer("rnn").reset_state()
        trace = trace_gates(model, tokens[None])
        with common.replacing(args.out / f"{name}.html") as path:
            trace.to_html(path, vocabulary.decode(tokens))
    return checkpoint, {p: generate(model, vocabulary, p) for p in PREFIXES}


class ResetStates(keras.callbacks.Callback):
    """Resets the states of the RNN at the start of each epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.get_layer("rnn").reset_state()


class Progress(keras.callbacks.Callback):
    """Shows a progress bar, and now and then a text that the model generates."""

    def __init__(self, name, finished, epochs, vocabulary):
        super().__init__()
        self._bar = tqdm(initial=finished, total=epochs, desc=name, unit="epoch")
        self._bar.set_postfix_str("compiling the model")
        self._interval = max(1, epochs // 5)
        self._vocabulary = vocabulary

    def on_epoch_end(self, epoch, logs=None):
        numbers = "perplexity {perplexity:.2f}, {tokens_per_sec:,.0f} tokens/s"
        self._bar.set_postfix_str(numbers.format(**logs), refresh=False)
        self._bar.update()
        if (epoch + 1) % self._interval == 0:
            sample = generate(self.model, self._vocabulary, PREFIXES[0])
            if sample.rstrip() != PREFIXES[0]:
                self._bar.write(f"epoch {epoch + 1}: {sample}")

    def on_train_end(self, logs=None):
        self._bar.close()


def generate(model, vocabulary, prefix, length=50):
    """Continues `prefix`, always with the most probable character."""
    one_hot, cell = model.get_layer("one_hot"), model.get_layer("rnn").cell
    logits = model.get_layer("logits")
    tokens = list(vocabulary.encode(prefix))
    states = cell.get_initial_state(batch_size=1)
    for step in range(len(prefix) + length - 1):
        h, states = cell(one_hot(np.array([tokens[step]])), states)
        if step >= len(prefix) - 1:
            tokens.append(int(keras.ops.argmax(logits(h)[0])))
    return prefix + vocabulary.decode(tokens[len(prefix) :])


# --- experiment --------------------------------------------------------------


def main(argv=None):
    args = parse_arguments(argv)
    try:
        return compare(args)
    except common.ExampleError as error:
        return f"time_machine.py: error: {error}"


def compare(args):
    """Trains the layers one after another; returns an error message or 0."""
    use_one_thread_per_op()
    args.device = find_device(args.device)
    text, vocabulary, batches = load_data(args)
    trainers = dict.fromkeys(LAYERS if args.layer == "all" else [args.layer], train)
    if args.compare_d2l:
        trainers["d2l"] = import_d2l()
    folder, runs, problems = args.out / "checkpoints", [], []
    with common.lock(args.out), Interrupt() as interrupt:
        prepare(folder, settings(args, batches.corpus), args.resume)
        if not text.is_the_book:
            print(f"The text is {text.source}: results do not compare with the book's.")
        if BACKEND == "jax" and args.sampling == "sequential":
            print("On JAX, `keras.layers.RNN` has no states between batches of `fit`.")
        with contextlib.suppress(KeyboardInterrupt):
            for name, trainer in trainers.items():
                if interrupt.requested:
                    break
                run, samples = trainer(name, args, vocabulary, batches, interrupt)
                if run.failure:
                    problems.append(f"{name}: {run.failure}.")
                if run.epochs:
                    runs.append(summarize(name, run, samples, text, batches))
                    write_report(runs, args.out)
    for result in runs:
        print(f"{result['layer']}: {result['closing_line']}")
        print(*(f"    {sample}" for sample in result["samples"].values()), sep="\n")
    if runs:
        print("Some words run together: the book joins the lines of the text.")
        print(f"Report: {args.out}")
    if interrupt.requested:
        finished = {n: max(checkpoints(folder, n), default=0) for n in trainers}
        each = ", ".join(f"{name} {epochs}" for name, epochs in finished.items())
        problems.append(
            f"Interrupted after {sum(finished.values())} finished epochs ({each}). "
            "To continue, run the same command with --resume."
        )
    return "\n".join(problems) or 0


def settings(args, corpus):
    """Returns what the weights of an epoch depend on."""
    names = ["units", "batch_size", "num_steps", "learning_rate", "sampling", "seed"]
    names += ["device", "quick"]
    text = hashlib.sha256(corpus).hexdigest()
    versions = {"backend": BACKEND, "keras": keras.__version__}
    return {name: vars(args).get(name) for name in names} | {"text": text} | versions


def use_one_thread_per_op():
    """Keeps TensorFlow from splitting the small matmuls of a time step."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # TensorFlow is already running
            tf.config.threading.set_intra_op_parallelism_threads(1)


def import_d2l():
    try:
        from helpers.d2l_lstm import train as train_d2l
    except ImportError as error:
        raise common.ExampleError(
            "--compare-d2l needs the tensorflow backend, and d2l: run "
            f'`pip install -e ".[examples,d2l]"`. Received: {error}'
        ) from None
    return train_d2l


if __name__ == "__main__":
    common.end_process(main())
