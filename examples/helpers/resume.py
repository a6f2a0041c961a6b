"""Checkpoints to resume an interrupted run from, and the signals that interrupt it."""

import json
import os
import re
import signal
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
from helpers.common import ExampleError, replacing


class Checkpoint(keras.callbacks.Callback):
    """Saves the model and its logs after each epoch, and restores the last ones.

    `keras.callbacks.BackupAndRestore` does not survive every kill: it overwrites two
    files in place, so the weights of one epoch may be left with the number of another,
    or as a file that HDF5 cannot read. Here, a file is complete before it has its name.

    A non-finite loss or weight ends training, is not saved, and is told in `failure`.
    Of several processes that train one model, one `writes`, and all `restore`.
    """

    def __init__(self, folder, name, model, writes=True, restore=True):
        super().__init__()
        self._writes = writes
        self._folder, self._name, self._logs = folder, name, folder / f"{name}.json"
        self.set_model(model)
        self.epochs, self.history, self.failure = 0, {}, None
        if restore:
            self.restore()

    @property
    def device(self):
        """The device of the model, as the backend reports it."""
        return self.model.weights[0].value.device

    def on_epoch_end(self, epoch, logs=None):
        values = [logs["loss"], *self.model.get_weights()]
        if not all(np.isfinite(value).all() for value in values):
            self.failure = f"epoch {epoch + 1} gave a loss or weight that is not finite"
            self.model.stop_training = True
            return
        for key, value in logs.items():
            self.history.setdefault(key, []).append(float(value))
        self.epochs = epoch + 1
        if self._writes:
            self._save(epoch)
            return
        # JAX needs all processes to take part in gathering the weights.
        with tempfile.TemporaryDirectory() as folder:
            self.model.save(Path(folder, "discarded.keras"))

    def _save(self, epoch):
        with replacing(self._logs) as path:
            path.write_text(json.dumps(self.history))
        with replacing(self._folder / f"{self._name}-{epoch + 1}.keras") as path:
            self.model.save(path)
        for epochs, path in checkpoints(self._folder, self._name).items():
            if epochs < epoch:  # Keep the previous one, in case the disk fails.
                path.unlink()

    def on_train_end(self, logs=None):
        if self.failure:
            self.restore()

    def restore(self):
        """Restores the last intact checkpoint, if there is any."""
        files = checkpoints(self._folder, self._name)
        # Keras does not load the state of an optimizer that is not built.
        self.model.optimizer.build(self.model.trainable_variables)
        for epochs, path in sorted(files.items(), reverse=True):
            try:
                self.model.load_weights(path)
            except (OSError, KeyError, ValueError, zipfile.BadZipFile):
                print(f"{path} is damaged. Trying the previous checkpoint.")
                continue
            # A kill may have left the logs one epoch ahead of the weights.
            history = json.loads(self._logs.read_text())
            self.history = {key: values[:epochs] for key, values in history.items()}
            self.epochs = epochs
            return
        if files:
            raise ExampleError(
                f"{self._folder} must have an intact checkpoint of {self._name}. "
                "Omit --resume to start from scratch."
            )


def checkpoints(folder, name):
    """Returns a dict of the finished epochs of a layer to the paths of its models."""
    pattern = re.compile(rf"{name}-(\d+)\.keras")
    found = {path: pattern.fullmatch(path.name) for path in folder.glob(f"{name}-*")}
    return {int(match[1]): path for path, match in found.items() if match}


def prepare(folder, settings, resume):
    """Checks the settings of a run to resume, or renames its folder for a new run."""
    path = folder / "settings.json"
    if resume and path.exists():
        before = json.loads(path.read_text())
        for key, value in settings.items():
            if value != before.get(key):
                raise ExampleError(
                    "--resume must have the settings of the interrupted run. "
                    f"Received: {key}={value!r} (was {before.get(key)!r})"
                )
        return
    if path.exists():
        number = 1
        while (renamed := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        folder.rename(renamed)
        print(f"Starting from scratch. Earlier checkpoints are in {renamed}.")
    folder.mkdir(exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(settings, indent=2))


class Interrupt(keras.callbacks.Callback):
    """Within its `with` block, ends training after an epoch on Ctrl-C or SIGTERM."""

    requested = False

    def __enter__(self):
        signals = signal.SIGINT, signal.SIGTERM
        self._handlers = {n: signal.signal(n, self._request) for n in signals}
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nStopping after this epoch. Press Ctrl-C again to stop now.\n")

    def on_epoch_end(self, epoch, logs=None):
        if self.requested:
            self.model.stop_training = True
