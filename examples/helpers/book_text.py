"""The text, vocabulary and minibatches of the book "Dive into Deep Learning".

The book trains a character-level model on H. G. Wells's "The Time Machine" (1895):
https://d2l.ai/chapter_recurrent-neural-networks/language-model.html
"""

import contextlib
import hashlib
import http.client
import os
import random
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from helpers.common import ExampleError, replacing

URL = "http://d2l-data.s3-accelerate.amazonaws.com/timemachine.txt"
SHA256 = "8424dbd9532ac81f7e5f0b6add90e6952baea29158309d7d1bf3884f4e12c516"
BUNDLED = Path(__file__).parents[1] / "time_traveller.txt"
DOWNLOAD_SECONDS = 30
PREFIXES = ("time traveller", "traveller")  # that a trained model continues


class Text(NamedTuple):
    """A text, its source, and whether it is the book's text."""

    characters: str
    source: str
    is_the_book: bool


def load_text(path=None):
    """Returns a text from a file, or the book's text from Keras's cache or the web.

    If the book's text cannot be downloaded, returns the bundled short story.
    """
    if path is not None:
        return _read(path)
    home = os.environ.get("KERAS_HOME", Path.home() / ".keras")
    cached = Path(home, "datasets", "timemachine.txt")  # as `keras.utils.get_file`
    if cached.exists() and (text := _read(cached)).is_the_book:
        return text
    print(f"Downloading {URL}")
    try:
        text = _decode(content := _download(), URL)
    except (OSError, http.client.HTTPException, ExampleError):
        text = None
    if text is None or not text.is_the_book:  # but the page of a proxy, for example
        print(f"The Time Machine cannot be downloaded: using {BUNDLED.name}, a story.")
        return _read(BUNDLED)
    with contextlib.suppress(OSError, ExampleError):  # A read-only cache is no error.
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as unfinished:
            unfinished.write_bytes(content)
    return text


def tokenize(text):
    """Splits a text into the book's tokens: lowercase letters and single spaces."""
    lines = re.split("\r\n?|\n", text)
    return list("".join(re.sub("[^A-Za-z]+", " ", x).strip().lower() for x in lines))


class Vocabulary:
    """The tokens of a text: `<unk>` first, then by descending frequency."""

    def __init__(self, tokens):
        self.tokens = ["<unk>", *(token for token, _ in Counter(tokens).most_common())]
        self._index = {token: index for index, token in enumerate(self.tokens)}

    def __len__(self):
        return len(self.tokens)

    def encode(self, tokens):
        return np.array([self._index.get(token, 0) for token in tokens], "int32")

    def decode(self, indices):
        return "".join(self.tokens[index] for index in indices)


def sequential_starts(num_tokens, batch_size, num_steps, rng):
    """Returns where the windows of an epoch start, by sequential partitioning.

    The text, from a random offset, is split into `batch_size` rows, and a batch is a
    window of `num_steps` columns. So each row continues in the next batch.

    Returns:
        Integer array of shape `(batches, batch_size)`.
    """
    offset = rng.randint(0, num_steps)
    columns = (num_tokens - offset - 1) // batch_size
    first_row = offset + num_steps * np.arange(columns // num_steps)
    return first_row[:, None] + columns * np.arange(batch_size)


def random_starts(num_tokens, batch_size, num_steps, rng):
    """Returns where the windows of an epoch start, in random order."""
    offset = rng.randint(0, num_steps - 1)
    starts = np.arange(offset, num_tokens - num_steps, num_steps)
    rng.shuffle(starts)
    num_batches = len(starts) // batch_size
    return starts[: num_batches * batch_size].reshape(num_batches, batch_size)


class Minibatches(keras.utils.PyDataset):
    """An endless stream of minibatches `(x, y)`, one epoch after another.

    One stream, divided by `steps_per_epoch`, because a new iterator for each of these
    short epochs takes longer than the training. The batches of an epoch depend only on
    `seed` and its number, so that a run can resume at any epoch.
    The stream starts with `first_epoch`, and has the `rows` of one process.
    """

    num_batches = None  # endless

    def __init__(self, corpus, batch_size, num_steps, sampling, seed):
        super().__init__()
        self.corpus, self.first_epoch, self.rows = corpus, 0, slice(None)
        self._size, self._seed = (batch_size, num_steps), seed
        self._sequential = sampling == "sequential"
        self._starts = None, None
        # At the latest offset, so that all epochs have the same number of batches.
        skipped, batch = num_steps + self._sequential, batch_size * num_steps
        self.steps_per_epoch = (len(corpus) - skipped) // batch
        if self.steps_per_epoch < 1:
            raise ExampleError(
                f"The text must have at least {batch + skipped} characters for a batch "
                f"of {batch_size} x {num_steps}. Received: {len(corpus)} characters"
            )
        self.tokens_per_epoch = self.steps_per_epoch * batch

    def __getitem__(self, index):
        number, step = divmod(index, self.steps_per_epoch)
        starts = self._starts_of_epoch(self.first_epoch + number)[step, self.rows]
        windows = self.corpus[starts[:, None] + np.arange(self._size[1] + 1)]
        windows = windows.astype("int32")
        return windows[:, :-1], windows[:, 1:]

    def _starts_of_epoch(self, number):
        if self._starts[0] != number:
            rng = random.Random(f"{self._seed} {number}")
            sample = sequential_starts if self._sequential else random_starts
            self._starts = number, sample(len(self.corpus), *self._size, rng)
        return self._starts[1]


def _read(path):
    try:
        return _decode(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise ExampleError(f"{path} cannot be read: {error.strerror}.") from None


def _decode(content, source):
    try:
        characters = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ExampleError(f"{source} must be encoded in UTF-8.") from None
    return Text(characters, source, hashlib.sha256(content).hexdigest() == SHA256)


def _download():
    # Not by `keras.utils.get_file`, which has no time limit.
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content = bytearray()
    with urllib.request.urlopen(URL, timeout=DOWNLOAD_SECONDS / 3) as response:
        while chunk := response.read1(1 << 16):
            content += chunk
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(content)
