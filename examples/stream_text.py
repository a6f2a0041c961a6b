"""A text of any size as minibatches, read piece by piece and never held whole.

    python examples/distributed.py --stream FILE

The tokens, the vocabulary and the minibatches are those of `book_text`, as if the
text were in memory; only random sampling draws from a window of it, not from all.
The file is read once to count, and then once an epoch, through `tf.data`, whatever
the backend.
"""

import bisect
import codecs
import random
import string
from array import array
from collections import Counter

import keras
import numpy as np
from book_text import Minibatches, TextError, Vocabulary

PIECE = 1 << 16  # bytes read at a time
BLOCK = 1 << 10  # windows handed to `tf.data` at a time
SHUFFLED = 1 << 14  # windows that random sampling draws from

# What a byte counts for: a letter in lower case, the end of a line, or a gap.
_TABLE = bytearray(b" " * 256)
for _letter in string.ascii_letters:
    _TABLE[ord(_letter)] = ord(_letter.lower())
for _end in "\r\n":
    _TABLE[ord(_end)] = ord("\n")


def clean(piece, before=b""):
    """The tokens of a piece of a text, as `book_text.tokenize` has those of all.

    Only the letters of ASCII count, so this is done byte by byte, and it does not
    matter where a line, or a character of several bytes, is cut.

    Args:
        piece: Bytes, the next ones of the text.
        before: What came back beside the tokens of the piece before.

    Returns:
        The tokens as bytes, and what the next call needs to know of the line that
        is not over: whether it has begun, and whether a gap came last.
    """
    text = before + piece.translate(_TABLE)
    lines = text.split(b"\n")
    cleaned = b"".join([b" ".join(line.split()) for line in lines])
    after = b""
    if lines[-1].strip():
        after = b"x " if lines[-1].endswith(b" ") else b"x"
    return cleaned[len(before.strip()) :], after


class TextFile:
    """A text in a file of any size: its length and vocabulary, from one pass.

    Args:
        path: The file, in UTF-8.

    Attributes:
        vocabulary: The `Vocabulary`.

    Raises:
        TextError: The file is unreadable, or no text in UTF-8.
    """

    def __init__(self, path):
        self.path = path
        counts, tokens = Counter(), 0
        self._first = array("q")  # of each piece, the number of its first token
        self._before = []  # and what `clean` is to know of the piece before
        decoder = codecs.getincrementaldecoder("utf-8")()
        before = b""
        try:
            with self.open() as file:
                while piece := file.read(PIECE):
                    decoder.decode(piece)
                    self._first.append(tokens)
                    self._before.append(before)
                    text, before = clean(piece, before)
                    tokens += len(text)
                    counts.update(_count(text))
            decoder.decode(b"", final=True)
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise TextError(f"{path} is no text in UTF-8.") from None
        self._first.append(tokens)
        self.vocabulary = Vocabulary(counts)
        self._index = np.zeros(256, "int32")
        self._index[[ord(token) for token in counts]] = self.vocabulary.encode(counts)

    def __len__(self):
        return self._first[-1]

    def open(self):
        return open(self.path, "rb", buffering=PIECE)

    def piece_of(self, token):
        """The number of the piece with this token, and the token's place in it."""
        piece = bisect.bisect(self._first, token) - 1
        return piece, token - self._first[piece]

    def piece(self, file, number):
        """The indices of the tokens of one piece."""
        text = b""
        if number < len(self._before):
            file.seek(number * PIECE)
            text, _ = clean(file.read(PIECE), self._before[number])
        if number >= len(self._before) or len(text) != (
            self._first[number + 1] - self._first[number]
        ):
            raise TextError(f"{self.path} has changed while it was in use.")
        return self._index[np.frombuffer(text, "uint8")]


def stream(text, batch_size, num_steps, sampling, seed):
    """Epoch after epoch of minibatches of a `TextFile`, without end.

    Args:
        text: A `TextFile`.
        batch_size: Integer.
        num_steps: Integer, the time steps of a minibatch.
        sampling: `"sequential"`, for the minibatches of `book_text.Minibatches`, one
            by one. Or `"random"`: the same windows as there, in an order that is
            drawn from the next 16,384 of them at a time.
        seed: Integer, the seed of all offsets and orders.

    Returns:
        A `tf.data.Dataset` of `(x, y)`, integers of shape `(batch_size, num_steps)`,
        and how many of them are an epoch.

    Raises:
        TextError: The text is too short for one minibatch.
    """
    tf = _import_tensorflow()
    # Needs to know how long the text is, and no more.
    steps = Minibatches(text, batch_size, num_steps, sampling, seed).steps_per_epoch
    sequential = sampling == "sequential"

    def blocks(number):
        rng = random.Random(f"{seed} {number}")
        if sequential:
            return _sequential_blocks(text, batch_size, num_steps, steps, rng)
        return _random_blocks(text, num_steps, rng)

    def epoch(number):
        shape = (None, batch_size, num_steps) if sequential else (None, num_steps)
        one = tf.TensorSpec(shape, "int32")
        dataset = tf.data.Dataset.from_generator(
            blocks, args=(number,), output_signature=(one, one)
        ).unbatch()
        if not sequential:
            dataset = dataset.batch(batch_size, drop_remainder=True)
        return dataset.take(steps)

    return tf.data.Dataset.counter().flat_map(epoch).prefetch(2), steps


def _sequential_blocks(text, batch_size, num_steps, steps, rng):
    offset = rng.randint(0, num_steps)
    columns = (len(text) - offset - 1) // batch_size
    at_once = max(1, BLOCK // batch_size)
    with text.open() as file:
        rows = [_Reader(text, file, offset + k * columns) for k in range(batch_size)]
        for first in range(0, steps, at_once):
            count = min(at_once, steps - first)
            tokens = np.stack([row.take(count * num_steps) for row in rows])

            def windows(tokens, count=count):
                return tokens.reshape(batch_size, count, num_steps).swapaxes(0, 1)

            yield windows(tokens[:, :-1]), windows(tokens[:, 1:])


def _random_blocks(text, num_steps, rng):
    offset = rng.randint(0, num_steps - 1)
    num_windows = (len(text) - offset - 1) // num_steps
    with text.open() as file:
        reader = _Reader(text, file, offset)
        for first in range(0, num_windows, SHUFFLED):
            count = min(SHUFFLED, num_windows - first)
            order = rng.sample(range(count), count)
            tokens = reader.take(count * num_steps)
            x, y = tokens[:-1].reshape(count, -1), tokens[1:].reshape(count, -1)
            yield x[order], y[order]


class _Reader:
    """Reads on from one token, a piece at a time."""

    def __init__(self, text, file, token):
        self._text, self._file = text, file
        self._number, self._at = text.piece_of(token)
        self._held = text.piece(file, self._number)

    def take(self, count):
        """The next tokens, and the one after, with which the next call begins."""
        taken, missing = [], count + 1
        while (left := len(self._held) - self._at) < missing:
            taken.append(self._held[self._at :])
            missing -= left
            self._number += 1
            self._held, self._at = self._text.piece(self._file, self._number), 0
        taken.append(self._held[self._at : self._at + missing])
        self._at += missing - 1
        return np.concatenate(taken)


def _count(text):
    """How often each token is in a text, in the order in which they come."""
    counts = np.bincount(np.frombuffer(text, "uint8"), minlength=256)
    tokens = sorted(np.flatnonzero(counts).tolist(), key=lambda t: text.find(t))
    return {chr(token): int(counts[token]) for token in tokens}


def _import_tensorflow():
    import tensorflow as tf

    if keras.backend.backend() != "tensorflow":
        # Else TensorFlow takes the memory of the GPUs that another works on.
        tf.config.set_visible_devices([], "GPU")
    return tf
