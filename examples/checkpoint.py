"""Checkpoints, from which a run goes on as if nothing had happened.

A checkpoint is a `.npz` file with its SHA-256 behind it, which `np.load` does not
mind. It is written beside its place and moved there when it is whole.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import zipfile
from typing import NamedTuple

import keras
import numpy as np

FORMAT = "keras_scratch_lstm/examples/checkpoint 1"
KEPT = 2


class FileError(Exception):
    """A file that cannot be written or used; the message is one sentence."""


@contextlib.contextmanager
def replacing(path):
    """Gives a path to write to; what is there in the end takes the place of `path`.

    Whenever the process ends, `path` is the file that was there before, or the new
    one, whole.

    Raises:
        FileError: It cannot be written.
    """
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"{path} cannot be written: {reason}.") from None
    finally:
        with contextlib.suppress(OSError):  # moved away, as a rule
            unfinished.unlink()


class Saved(NamedTuple):
    """What a run is after so many epochs.

    The values of its variables, the random state outside them, and what it reports.
    """

    epochs: int
    arrays: list
    random: dict
    history: dict
    seconds: float


class Checkpoints:
    """The checkpoints of one run, a file each; the last two are kept.

    Args:
        folder: `Path`.
        name: String, the run's name.
        origin: Dict of strings and numbers that the run depends on.
    """

    def __init__(self, folder, name, origin):
        self._folder = folder
        self._name = name
        self._origin = origin

    def save(self, saved):
        """Saves a run, as `Saved`.

        Raises:
            FileError: It cannot be written; the older checkpoints are as they were.
        """
        rest = saved._asdict()
        arrays = rest.pop("arrays")
        header = json.dumps({"format": FORMAT, "origin": self._origin, "saved": rest})
        buffer = io.BytesIO()
        np.savez(buffer, *arrays, header=header)
        content = buffer.getvalue()
        with replacing(self._folder / f"{self._name}-{saved.epochs}.npz") as path:
            path.write_bytes(content + hashlib.sha256(content).digest())
        for epochs, path in self._files():
            if epochs <= saved.epochs - KEPT:
                with contextlib.suppress(OSError):
                    path.unlink()

    def load(self):
        """The last checkpoint that is whole, as `Saved`, or `None` if there is none.

        Raises:
            FileError: It is of another origin, or there are some and none is whole.
        """
        files = sorted(self._files(), reverse=True)
        for _, path in files:
            saved = self._read(path)
            if saved is not None:
                return saved
            print(f"{path} is damaged, or no checkpoint of this program: passed over.")
        if files:
            raise FileError(
                f"{self._folder} has no checkpoint of {self._name} that is whole; "
                "without --resume, the run starts afresh."
            )
        return None

    def _files(self):
        for path in self._folder.glob(f"{self._name}-*.npz"):
            with contextlib.suppress(ValueError):
                yield int(path.stem.removeprefix(f"{self._name}-")), path

    def _read(self, path):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}.") from None
        content, digest = content[:-32], content[-32:]
        if hashlib.sha256(content).digest() != digest:
            return None
        try:
            with np.load(io.BytesIO(content)) as file:
                header = json.loads(str(file["header"]))
                arrays = [file[f"arr_{k}"] for k in range(len(file.files) - 1)]
            if header["format"] != FORMAT:
                return None
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile):
            return None  # whole, but of another program
        self._check_origin(path, header["origin"])
        return Saved(arrays=arrays, **header["saved"])

    def _check_origin(self, path, origin):
        differences = [
            f"{key} was {origin.get(key)!r} and is {self._origin.get(key)!r}"
            for key in {**self._origin, **origin}
            if origin.get(key) != self._origin.get(key)
        ]
        if differences:
            raise FileError(f"{path} is of another run: {', '.join(differences)}.")


class Checkpoint(keras.callbacks.Callback):
    """Saves after each epoch all that the next one depends on, or goes on from it.

    That is the weights, the optimizer, the random numbers to come and the states of
    RNNs. Place it behind the callbacks that add to the logs, and start `fit`
    with `initial_epoch=checkpoint.epochs`. On torch, give dropout a seed: without, it
    draws from the same numbers as torch's data loader, which `fit` makes anew.

    An epoch with a loss or a variable that is not finite is not saved. It ends the
    training, and the model is again what it was before that epoch, unless it
    was the first.

    Args:
        files: `Checkpoints`.
        model: The model, built and compiled.
        logger: The `PerplexityLogger` of the run, for its time.
        saved: What `files.load()` gave, to go on from there.

    Attributes:
        epochs: Integer, the finished epochs, those before `saved` included.
        history: Dict of their logs.
        seconds: Float, their time.
        failure: String, why the training had to end, or `None`.
    """

    def __init__(self, files, model, logger, saved=None):
        super().__init__()
        self._files = files
        self._logger = logger
        self.epochs, self.history, self.seconds = 0, {}, 0.0
        self.failure = None
        model.optimizer.build(model.trainable_variables)
        if saved is not None:
            restore(variables_of(model), saved)
            self.epochs, self.history = saved.epochs, saved.history
            self.seconds = saved.seconds
        self._seconds_before = self.seconds

    def on_epoch_end(self, epoch, logs=None):
        arrays = [keras.ops.convert_to_numpy(v) for v in variables_of(self.model)]
        self.failure = find_failure(self.epochs, "loss", logs["loss"], arrays)
        if self.failure:
            self.model.stop_training = True
            return
        self.epochs = epoch + 1
        self.seconds = self._seconds_before + self._logger.seconds
        for key, value in logs.items():
            self.history.setdefault(key, []).append(float(value))
        self._files.save(
            Saved(self.epochs, arrays, random_state(), self.history, self.seconds)
        )

    def on_train_end(self, logs=None):
        if self.failure and self.epochs:
            restore(variables_of(self.model), self._files.load())


def variables_of(model):
    """Weights, seeds, the optimizer's variables and the states of RNNs."""
    variables = [*model.variables, *model.optimizer.variables]
    for layer in model.layers:
        variables += getattr(layer, "states", None) or []
    return list({id(variable): variable for variable in variables}.values())


def restore(variables, saved):
    """Sets variables and random numbers to what was saved."""
    for variable, array in zip(variables, saved.arrays, strict=True):
        variable.assign(array)
    version, key, gauss = saved.random["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(saved.random["numpy"])


def random_state():
    """The state of Python's and NumPy's random numbers; Keras's are variables."""
    of_numpy = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": of_numpy}


def find_failure(epochs, name, value, arrays):
    """Says what is not finite in the epoch after so many, or gives `None`."""
    if not math.isfinite(value):
        failure = f"the {name} of epoch {epochs + 1} is {value}"
    elif not all(np.isfinite(array).all() for array in arrays):
        failure = f"after epoch {epochs + 1} there are weights that are not finite"
    else:
        return None
    kept = f"the weights after epoch {epochs} are" if epochs else "nothing is"
    return f"{failure}; {kept} kept"


def set_aside(folder):
    """Renames a folder to the first free `folder-1`, `folder-2`, …, and gives that.

    Raises:
        FileError: It cannot be renamed.
    """
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    try:
        return folder.rename(aside)
    except OSError as error:
        raise FileError(
            f"{folder} cannot be renamed to {aside}: {error.strerror}."
        ) from None
