"""The text, the vocabulary and the minibatches of the book "Dive into Deep Learning".

The book trains on H. G. Wells's "The Time Machine" (1895), one character at a
time: https://d2l.ai/chapter_recurrent-neural-networks/language-model.html
"""

import contextlib
import copy
import hashlib
import http.client
import os
import random
import re
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

URL = "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
SHA256 = "8424dbd9532ac81f7e5f0b6add90e6952baea29158309d7d1bf3884f4e12c516"
BUNDLED = Path(__file__).with_name("time_traveller.txt")
DOWNLOAD_SECONDS = 30


class TextError(Exception):
    """A text that cannot be had or used; the message is one sentence."""


class Text(NamedTuple):
    """A text, where it came from, and whether it is the book's own."""

    characters: str
    source: str
    is_the_book: bool


def load_text(path=None):
    """The book's text: from `path`, else from Keras's cache, else downloaded.

    Where it can be had from nowhere, it is the bundled story instead.

    Raises:
        TextError: A file is unreadable, or it is not the book's text.
    """
    if path is not None:
        return _the_book(_read(path), str(path))
    cached = _cache() / "timemachine.txt"
    if cached.exists():
        return _the_book(_read(cached), str(cached))
    try:
        content = _download()
    except (OSError, http.client.HTTPException):
        return load_own_text(BUNDLED)
    text = _the_book(content, URL)
    _keep(content, cached)
    return text


def load_own_text(path):
    """Any other text, in UTF-8."""
    try:
        return Text(_read(path).decode("utf-8"), str(path), is_the_book=False)
    except UnicodeDecodeError:
        raise TextError(f"{path} is no text in UTF-8.") from None


def tokenize(text):
    """The book's tokens: letters, in lower case, and what lies between as a space."""
    lines = re.split("\r\n?|\n", text)
    cleaned = (re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in lines)
    return list("".join(cleaned))


class Vocabulary:
    """The tokens of a text, `<unk>` first and then the most frequent first."""

    def __init__(self, tokens):
        self.tokens = ["<unk>", *(token for token, _ in Counter(tokens).most_common())]
        self._index = {token: index for index, token in enumerate(self.tokens)}

    def __len__(self):
        return len(self.tokens)

    def encode(self, tokens):
        return np.array([self._index.get(token, 0) for token in tokens], "int32")

    def decode(self, indices):
        return "".join(self.tokens[index] for index in indices)


def sequential_batches(corpus, batch_size, num_steps, rng):
    """One epoch of the book's sequential partition.

    From a random offset on, the corpus is cut into `batch_size` long rows, and
    a minibatch is a window of `num_steps` columns: what a row of one minibatch
    begins, the same row of the next goes on with.

    Args:
        corpus: Integer array of shape `(tokens,)`.
        batch_size: Integer.
        num_steps: Integer, the time steps of a minibatch.
        rng: A `random.Random`, or the module `random`.

    Returns:
        `(x, y)`, integer arrays of shape `(batches, batch_size, num_steps)`;
        `y` is one token ahead of `x`.
    """
    offset = rng.randint(0, num_steps)
    columns = (len(corpus) - offset - 1) // batch_size
    num_batches = columns // num_steps

    def windows(start):
        rows = corpus[start : start + batch_size * columns].reshape(batch_size, -1)
        rows = rows[:, : num_batches * num_steps]
        return rows.reshape(batch_size, num_batches, num_steps).swapaxes(0, 1)

    return windows(offset), windows(offset + 1)


def random_batches(corpus, batch_size, num_steps, rng):
    """One epoch of the book's random sampling: windows in random order.

    Arguments and results are those of `sequential_batches`.
    """
    offset = rng.randint(0, num_steps - 1)
    num_windows = (len(corpus) - offset - 1) // num_steps
    starts = [offset + k * num_steps for k in range(num_windows)]
    rng.shuffle(starts)
    num_batches = num_windows // batch_size
    starts = np.array(starts[: num_batches * batch_size])
    index = starts.reshape(num_batches, batch_size, 1) + np.arange(num_steps)
    return corpus[index], corpus[index + 1]


class Minibatches(keras.utils.PyDataset):
    """Epoch after epoch of minibatches, without end.

    One stream for all epochs, cut by `steps_per_epoch`, spares `fit` a new
    iterator for each, which with short epochs takes longer than training.
    Batch number `k` depends on `seed` and `k` alone.

    Where the offset decides whether there is one minibatch more, it is left
    out, so that all epochs have as many.

    Args:
        corpus: Integer array of shape `(tokens,)`.
        batch_size: Integer.
        num_steps: Integer.
        sampling: `"sequential"` or `"random"`.
        seed: Integer, the seed of all offsets and orders.

    Raises:
        TextError: The corpus is too short for one minibatch.
    """

    def __init__(self, corpus, batch_size, num_steps, sampling, seed):
        super().__init__()
        self.corpus = corpus
        self._size = batch_size, num_steps
        self._seed = seed
        tokens = batch_size * num_steps
        if sampling == "sequential":
            self._batches = sequential_batches
            needed = tokens + num_steps + 1
            columns = (len(corpus) - num_steps - 1) // batch_size
            self.steps_per_epoch = columns // num_steps
        else:
            self._batches = random_batches
            needed = tokens + num_steps
            self.steps_per_epoch = (len(corpus) - num_steps) // num_steps // batch_size
        if self.steps_per_epoch < 1:
            raise TextError(
                f"the text has {len(corpus)} characters; a minibatch of {batch_size} x "
                f"{num_steps} needs at least {needed}."
            )
        self.tokens_per_epoch = self.steps_per_epoch * tokens
        self._first = 0
        self._epoch = None

    def from_epoch(self, number):
        """The same stream from the start of an epoch on."""
        rest = copy.copy(self)
        rest._first, rest._epoch = number, None
        return rest

    @property
    def num_batches(self):
        return None  # without end

    def epoch(self, number):
        """The minibatches of one epoch, as `sequential_batches` gives them."""
        rng = random.Random(f"{self._seed} {number}")
        x, y = self._batches(self.corpus, *self._size, rng)
        return x[: self.steps_per_epoch], y[: self.steps_per_epoch]

    def __getitem__(self, index):
        number, step = divmod(index, self.steps_per_epoch)
        number += self._first
        if self._epoch is None or self._epoch[0] != number:
            self._epoch = number, self.epoch(number)
        x, y = self._epoch[1]
        return x[step], y[step]


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from None


def _the_book(content, source):
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise TextError(
            f"{source} is not the book's text: its SHA-256 is {found}, "
            f"expected {SHA256}."
        )
    return Text(content.decode("utf-8"), source, is_the_book=True)


def _cache():
    """The folder that `keras.utils.get_file` keeps its files in."""
    home = os.environ.get("KERAS_HOME", Path.home() / ".keras")
    return Path(home) / "datasets"


def _download():
    # `keras.utils.get_file` has no time limit, hence not here.
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    with urllib.request.urlopen(URL, timeout=DOWNLOAD_SECONDS / 3) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole file after {DOWNLOAD_SECONDS} s")
    return bytes(content)


def _keep(content, path):
    """Writes the file whole or not at all; a cache that cannot be is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
