"""Options and output files of the examples, without imports that take seconds."""

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported


class ExampleError(Exception):
    """An error that ends an example; its message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """Shows defaults that are not `None`, and keeps the lines of the description."""

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)


def create_parser(prog, text):
    formatter = argparse.RawDescriptionHelpFormatter
    return Parser(prog, description=text, formatter_class=formatter)


def add_training_options(parser, out, sampling):
    """Adds the options of the Time Machine experiment."""
    add = parser.add_argument
    add("--epochs", type=positive_integer, default=500, help="passes over the text")
    add("--units", type=positive_integer, default=256, help="size of h and of c")
    add("--batch-size", type=positive_integer, default=32, help="sequences per batch")
    add("--num-steps", type=positive_integer, default=35, help="time steps per batch")
    add("--learning-rate", type=positive_number, default=1.0, help="for SGD")
    add("--max-tokens", type=positive_integer, default=10_000, help="text length")
    orders = ["sequential", "random"]
    add("--sampling", choices=orders, default=sampling, help="order of the batches")
    add("--seed", type=seed, default=2, help="for weights and batches")
    add("--out", type=Path, default=Path(out), help="output folder")
    add("--text", type=Path, help="text to train on, if not The Time Machine")


def number(kind, is_valid, rule):
    """Returns a `type` for `add_argument`."""

    def convert(argument):
        with contextlib.suppress(ValueError):
            if is_valid(value := kind(argument)):
                return value
        raise argparse.ArgumentTypeError(f"must be {rule}. Received: {argument!r}")

    return convert


positive_integer = number(int, lambda n: n > 0, "a positive integer")
positive_number = number(float, lambda x: 0 < x < math.inf, "a positive number")
seed = number(int, lambda n: 0 <= n < 2**32, "an integer in [0, 2**32)")


def load_keras():
    """Imports Keras without what TensorFlow logs when it is imported.

    Its log level does not apply there. Keras imports it for any backend if it can.
    """
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import keras  # noqa: F401

        with contextlib.suppress(ImportError):
            import tensorflow as tf

            tf.config.list_physical_devices()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def end_process(result):
    """Ends the process as `sys.exit(result)`, but at once.

    After an interrupt, TensorFlow waits at exit for a thread of its data pipeline that
    waits for Python, forever.
    """
    if isinstance(result, str):
        print(result, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(result, str) else result)


@contextlib.contextmanager
def lock(folder):
    """Creates and locks a folder; the system unlocks it if the process is killed."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "w"))
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            in_use = isinstance(error, BlockingIOError)
            rule = "no other run is using" if in_use else "is writable"
            raise ExampleError(
                f"--out must be a folder that {rule}. Received: {folder}"
            ) from None
        yield


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path, whose file then replaces `path` in one step."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise ExampleError(f"{path} cannot be written: {reason}.") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
