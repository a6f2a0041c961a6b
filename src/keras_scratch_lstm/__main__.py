"""The command `keras-scratch-lstm`, also `python -m keras_scratch_lstm`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(
        "keras-scratch-lstm", description="Convert models."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "convert",
        help="convert a Keras 2 file to Keras 3",
        description="Convert a Keras 2 file (HDF5, `.keras`, JSON) into a `.keras` "
        "file that Keras 3 opens without this package, and compare predictions.",
    )
    command.add_argument("old", type=Path, help="file of Keras 2")
    command.add_argument("new", type=Path, nargs="?", help="file to write, `.keras`")
    command.add_argument(
        "--weights", type=Path, help="file of the weights, if separate"
    )
    command.add_argument("--info", action="store_true", help="only describe the file")
    options = parser.parse_args(arguments)
    if options.info == (options.new is not None):
        command.error("pass the path of a new file, or --info")
    if options.new and options.new.suffix != ".keras":
        command.error(f"NEW must end with .keras. Received: {options.new}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from keras_scratch_lstm.convert import portable  # imports Keras

        if options.info:
            lines = portable.describe(options.old, options.weights)
        else:
            lines = portable.convert(options.old, options.new, options.weights)
        for line in lines:
            print(line)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
