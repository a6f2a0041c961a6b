"""Train on "The Time Machine" on several devices or machines, data-parallel.

Each replica has the whole model and takes its rows of each minibatch; the gradients
are summed. The numbers are those of one device with the same minibatches.

    python examples/distributed.py --virtual --devices 2
    export KERAS_BACKEND=jax
    python examples/distributed.py --processes 2
    python examples/distributed.py --processes 2 --rank 0 --coordinator 10.0.0.1:9876

TensorFlow's `MirroredStrategy` has the devices of one machine, `keras.distribution`
on JAX those of many. docs/distributed-training.md has the launch lines for a cluster.
"""

import contextlib
import inspect
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from argparse import SUPPRESS
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from book_text import (
    Minibatches,
    TextError,
    Vocabulary,
    load_own_text,
    load_text,
    tokenize,
)
from time_machine import (
    PREFIXES,
    ArgumentError,
    Parser,
    ResetStates,
    build_model,
    generate,
    natural_number,
    positive_integer,
    positive_number,
    prepare_folder,
)

from keras_scratch_lstm import Perplexity, PerplexityLogger, ScratchLSTM

BACKEND = keras.backend.backend()
METRICS_ARE_SUMMED = "synchronization" in inspect.signature(keras.Variable).parameters
LINES_A_RUN = 10
LOST = 75  # exit status of a process that has lost another one
TICK = 0.2  # seconds
STATEFUL = (
    "MirroredStrategy splits each minibatch, and a stateful RNN, whose states are as "
    "many as the rows of a whole one, does not survive that on TensorFlow"
)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    try:
        check(args)
        prepare_folder(args.out)
        if args.processes > 1 and not args.worker:
            return launch(args, argv)
        if args.virtual:
            cut_the_cpu(args.devices)
        text, vocabulary, batches, steps = load(args)
        with on_devices(args) as names:
            model, logger = train(args, names, vocabulary, batches, steps)
        # Out of the scope, as what is built there is built by all processes.
        if not args.rank:
            report(args, names, text, vocabulary, model, logger)
        return 0
    except (TextError, ArgumentError) as error:
        if args.worker:
            end(error, 1)
        return f"distributed.py: error: {error}"
    except KeyboardInterrupt:
        if args.worker:
            end("interrupted.", 1)
        return "distributed.py: error: interrupted."


def load(args):
    """The text, its vocabulary, and this process's share of the minibatches."""
    size = args.batch_size, args.num_steps, args.sampling, args.seed
    rank, rows = args.rank or 0, args.batch_size // args.processes
    share = slice(rank * rows, (rank + 1) * rows)
    if args.stream:
        from stream_text import TextFile, stream

        text = TextFile(args.stream)
        batches, steps = stream(text, *size)
        if args.processes > 1:
            batches = batches.map(lambda x, y: (x[share], y[share]))
        return str(args.stream), text.vocabulary, batches, steps
    text = load_own_text(args.own_text) if args.own_text else load_text(args.text)
    tokens = tokenize(text.characters)
    vocabulary = Vocabulary(tokens)
    corpus = vocabulary.encode(tokens)[: args.max_tokens]
    batches = Share(share, corpus, *size)
    return text.source, vocabulary, batches, batches.steps_per_epoch


class Share(Minibatches):
    """Some of the rows of each minibatch."""

    def __init__(self, rows, *args):
        super().__init__(*args)
        self._rows = rows

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x[self._rows], y[self._rows]


# --- the devices -------------------------------------------------------------


@contextlib.contextmanager
def on_devices(args):
    """Has models built within use all devices; gives their names."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU")
        devices = devices or tf.config.list_logical_devices("CPU")
        names = choose([device.name for device in devices], args)
        if len(names) > 1 and not METRICS_ARE_SUMMED:
            raise ArgumentError(
                f"Keras {keras.__version__} counts each replica again at each step; "
                "expected a newer one, such as 3.15, for several on TensorFlow."
            )
        with tf.distribute.MirroredStrategy(names).scope():
            yield names
        return

    import jax

    if args.processes > 1:
        meet(args)
    names = [
        choose(
            [f"{d.platform}:{d.id}" for d in jax.devices() if d.process_index == k],
            args,
        )
        for k in range(args.processes)
    ]
    if len({len(of_one) for of_one in names}) > 1:
        counts = ", ".join(str(len(of_one)) for of_one in names)
        raise ArgumentError(
            f"the processes have {counts} devices; expected as many each, which "
            "--devices can say."
        )
    names = [name for of_one in names for name in of_one]
    # Each process brings its own share of the data.
    distribution = keras.distribution.DataParallel(
        devices=names, auto_shard_dataset=False
    )
    with distribution.scope():
        yield names


def cut_the_cpu(count):
    """Has the backend take the CPU for several devices, which only a new one can."""
    try:
        if BACKEND == "tensorflow":
            import tensorflow as tf

            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * count,
            )
        else:
            import jax

            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise ArgumentError(
            f"--virtual cannot cut the CPU into {count} devices any more, as {BACKEND} "
            "is running already."
        ) from None


def choose(names, args):
    """As many of one process's devices as are asked for."""
    wanted = args.devices or len(names)
    if wanted > len(names):
        raise ArgumentError(
            f"--devices is {wanted}; expected at most {len(names)}, as {BACKEND} has "
            f"{', '.join(names)} here, or --virtual with it, to cut up the CPU."
        )
    check_batch_size(args, args.processes * wanted)
    return names[:wanted]


def check_batch_size(args, replicas):
    if args.batch_size % replicas:
        raise ArgumentError(
            f"--batch-size is {args.batch_size}; expected a multiple of {replicas}, "
            f"the number of replicas, each of which takes as many rows."
        )


# --- several processes -------------------------------------------------------


def meet(args):
    """Waits for all processes of the run."""
    where = f"the coordinator at {args.coordinator}"
    if args.rank:
        late = f"{where} cannot be reached, or waits for others"
    else:
        late = f"not all of the {args.processes} processes came to {where}"
    with TimeLimit(args.timeout) as limit:
        limit.start(late)
        try:
            keras.distribution.initialize(args.coordinator, args.processes, args.rank)
        except Exception as error:
            end(f"{where}: {str(error).strip().splitlines()[0]}", 1)


class TimeLimit(keras.callbacks.Callback):
    """Ends a process that has to wait too long, whatever it is stuck in.

    It may be waiting for another process, of which no exception comes.
    """

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds
        self._over = threading.Event()

    def __enter__(self):
        self.start("nothing happened")
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._over.set()

    def start(self, late):
        """The time begins anew; `late` is what to say when it is up."""
        self._late, self._left = late, self._seconds

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch + 1
        self.on_train_batch_end(0)

    def on_train_batch_end(self, batch, logs=None):
        self.start(f"no step ended in epoch {self._epoch}; a process may be lost")

    def _watch(self):
        # Counted, as a clock goes on while a process is suspended.
        while not self._over.wait(TICK):
            self._left -= TICK
            if self._left <= 0:
                end(f"{self._late} (after {self._seconds:g} s, --timeout).", LOST)


def end(message, status):
    """Ends the process at once; JAX would wait at its exit for the lost ones."""
    sys.stdout.flush()
    print(f"distributed.py: error: {message}", file=sys.stderr, flush=True)
    os._exit(status)


def launch(args, argv):
    """Starts the processes of this machine, and ends them all if one fails.

    Each has a process of its own, since JAX ends one that has lost the first of the
    run without a word that Python could say.
    """
    command = [sys.executable, __file__, *argv, "--worker"]
    environment, ranks = dict(os.environ), [args.rank]
    if args.rank is None:  # all of them, of which each would take all GPUs
        environment["JAX_PLATFORMS"] = "cpu"
        ranks = range(args.processes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            command += ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}"]
    # A batch system's `kill` is to end them, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    workers = {}
    try:
        for rank in ranks:
            with open(log_of(rank, args), "wb") as log:
                workers[rank] = subprocess.Popen(
                    [*command, "--rank", str(rank)],
                    env=environment,
                    stdout=log if rank else None,
                    stderr=log,
                )
        return wait(workers, args)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
        signal.signal(signal.SIGTERM, before)


def wait(workers, args):
    """Waits for all to succeed or one to fail; returns what to exit with."""
    while True:
        time.sleep(TICK)
        statuses = [worker.poll() for worker in workers.values()]
        if any(statuses):
            break
        if None not in statuses:
            return 0
    time.sleep(1)  # Which was the first? Those that lost it end soon, too.
    failed = {rank: worker.poll() for rank, worker in workers.items() if worker.poll()}
    rank = min(failed, key=lambda rank: failed[rank] in (LOST, -signal.SIGABRT))
    status, log = failed[rank], log_of(rank, args)
    said = re.findall(
        "^distributed.py: error: (.*)", log.read_text("utf-8", "replace"), re.M
    )
    if said:
        return f"distributed.py: error: process {rank}: {said[-1]}"
    if status == -signal.SIGABRT:
        why = "was ended by JAX, as it lost another process"
    elif status < 0:
        why = f"was ended by {signal.Signals(-status).name}"
    else:
        why = f"ended with status {status}"
    return f"distributed.py: error: process {rank} {why}; {log} has what it said."


def log_of(rank, args):
    return args.out / f"process-{rank}.log"


# --- the training ------------------------------------------------------------


def train(args, names, vocabulary, batches, steps):
    """Trains a model within the scope of `on_devices`."""
    first = not args.rank
    per_replica = args.batch_size // len(names)
    if first:
        print(
            f"{len(names)} replicas ({', '.join(names)}) in {args.processes} "
            f"processes, with {per_replica} of the {args.batch_size} rows each."
        )
        if BACKEND == "tensorflow":
            print(f"Sampling is {args.sampling}: {STATEFUL}.", flush=True)
    keras.utils.set_random_seed(args.seed)
    stateful = args.sampling == "sequential"
    rnn = ScratchLSTM(args.units, return_sequences=True, stateful=stateful, name="rnn")
    model = build_model(
        rnn, len(vocabulary), args.batch_size if stateful else None, args.num_steps
    )
    model.compile(
        optimizer=optimizer(args.learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[Perplexity()],
    )
    logger = PerplexityLogger(verbose=0)
    callbacks = [logger]
    if stateful:
        callbacks.append(ResetStates())
    if first:
        callbacks.append(Progress(args.epochs))
    with contextlib.ExitStack() as stack:
        if args.processes > 1:
            stack.enter_context(noticing_losses(args))
            callbacks.append(stack.enter_context(TimeLimit(args.timeout)))
        model.fit(
            batches,
            epochs=args.epochs,
            steps_per_epoch=steps,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    return model, logger


def optimizer(learning_rate):
    """The book's: plain SGD, with the norm of all gradients clipped at 1."""
    if BACKEND == "tensorflow":
        return ClippedSGD(learning_rate)
    return keras.optimizers.SGD(learning_rate, global_clipnorm=1.0)


@keras.saving.register_keras_serializable("distributed")
class ClippedSGD(keras.optimizers.SGD):
    """Clips the gradients of all replicas together, which Keras does one by one."""

    def apply_gradients(self, grads_and_vars):
        import tensorflow as tf

        gradients, variables = zip(*grads_and_vars, strict=True)
        context = tf.distribute.get_replica_context()
        gradients = context.all_reduce("sum", list(gradients))
        gradients, _ = tf.clip_by_global_norm(gradients, 1.0)
        # Keras is about to sum them over the replicas.
        share = 1 / context.num_replicas_in_sync
        gradients = [gradient * share for gradient in gradients]
        return super().apply_gradients(list(zip(gradients, variables, strict=True)))


@contextlib.contextmanager
def noticing_losses(args):
    """Ends this process where another has gone, of which JAX has many errors."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        end(
            "a step failed, as it does where another process is lost; "
            f"{log_of(args.rank, args)} has what it said.",
            LOST,
        )


class Progress(keras.callbacks.Callback):
    """A line after the first epoch, and now and then."""

    def __init__(self, epochs):
        super().__init__()
        self._every = math.ceil(epochs / LINES_A_RUN)

    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0 or (epoch + 1) % self._every == 0:
            print(
                f"epoch {epoch + 1}: perplexity {logs['perplexity']:.2f}, "
                f"{logs['tokens_per_sec']:,.0f} tokens/s",
                flush=True,
            )


def report(args, names, source, vocabulary, model, logger):
    """Writes `results.json` and the model, and prints what the model writes."""
    path = args.out / "model.keras"
    model.save(path)
    logs = model.history.history
    results = {
        "backend": BACKEND,
        "processes": args.processes,
        "replicas": names,
        "text": source,
        "sampling": args.sampling,
        "recurrence": model.get_layer("rnn").recurrence,
        "epochs": args.epochs,
        "tokens": round(logger.tokens_per_sec * logger.seconds),
        "tokens_per_sec": logger.tokens_per_sec,
        "seconds": logger.seconds,
        "closing_line": logger.closing_line,
        "history": {key: logs[key] for key in ("loss", "perplexity")},
    }
    content = json.dumps(results, indent=2) + "\n"
    (args.out / "results.json").write_text(content)
    print(logger.closing_line)
    model = keras.saving.load_model(path)  # with weights that are here alone
    for prefix in PREFIXES:
        print(f"    {generate(model, vocabulary, prefix)}")
    print(f"Report: {args.out}")


# --- the command line --------------------------------------------------------


def parse_arguments(argv):
    parser = Parser(
        prog="distributed.py",
        description='Train an LSTM on "The Time Machine" on several devices.',
    )
    add = parser.add_argument
    add(
        "--devices",
        type=positive_integer,
        metavar="N",
        help="how many of this machine's to use, in each process; default: all",
    )
    add(
        "--virtual",
        action="store_true",
        help="cut the CPU into as many devices as --devices says, to try it out",
    )
    add(
        "--processes",
        type=positive_integer,
        metavar="N",
        default=1,
        help="of the run; without --rank, all are started here, on the CPU",
    )
    add("--rank", type=natural_number, help="which one this is, from 0 on")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add(
        "--timeout",
        type=positive_number,
        default=120,
        metavar="S",
        help="longest wait for a step or another process; default: 120 seconds",
    )
    add("--worker", action="store_true", help=SUPPRESS)
    add("--epochs", type=positive_integer, default=500, help="default: 500")
    add("--units", type=positive_integer, default=256, help="default: 256")
    add(
        "--batch-size",
        type=positive_integer,
        default=32,
        help="rows of a minibatch, of all replicas together; default: 32",
    )
    add("--num-steps", type=positive_integer, default=35, help="default: 35")
    add("--learning-rate", type=positive_number, default=1.0, help="default: 1.0")
    add("--max-tokens", type=positive_integer, default=10_000, help="default: 10000")
    add(
        "--sampling",
        choices=["random", "sequential"],
        default="random",
        help="sequential: a minibatch goes on where the last one ended, on JAX; "
        "default: random",
    )
    add("--seed", type=natural_number, default=2, help="default: 2")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, help="where timemachine.txt lies")
    source.add_argument("--own-text", type=Path, help="any other text to train on")
    source.add_argument(
        "--stream", type=Path, help="a text of any size, all of it, never held whole"
    )
    add("--out", type=Path, default=Path("runs/distributed"), help="folder to fill")
    return parser.parse_args(argv)


def check(args):
    """What can be said before anything is started."""
    if BACKEND == "torch":
        raise ArgumentError(
            "Keras trains on several devices on tensorflow and jax; set KERAS_BACKEND "
            "to one of these, as it is torch."
        )
    if BACKEND == "tensorflow" and args.processes > 1:
        raise ArgumentError(
            "--processes needs KERAS_BACKEND=jax: TensorFlow's "
            "MultiWorkerMirroredStrategy does not run with Keras 3 "
            "(github.com/keras-team/keras/issues/20585)."
        )
    if BACKEND == "tensorflow" and args.sampling == "sequential":
        raise ArgumentError(
            f"--sampling is sequential; expected random: {STATEFUL}. KERAS_BACKEND=jax "
            "has it."
        )
    if args.virtual and args.devices is None:
        raise ArgumentError("--virtual needs --devices, the number of them.")
    if (args.rank is None) != (args.coordinator is None):
        raise ArgumentError("--rank and --coordinator need each other.")
    if args.rank is not None:
        if args.rank >= args.processes:
            raise ArgumentError(
                f"--rank is {args.rank}; expected one below {args.processes}, the "
                "number of --processes."
            )
        if not re.fullmatch(r"\S+:\d{1,5}", args.coordinator):
            raise ArgumentError(
                f"--coordinator is {args.coordinator!r}; expected a host and a port, "
                "such as 10.0.0.1:9876."
            )
    if args.processes > 1 or args.devices:
        check_batch_size(args, args.processes * (args.devices or 1))


if __name__ == "__main__":
    sys.exit(main())
