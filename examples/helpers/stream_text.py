"""The tokens of a text of any size, in a file that is never loaded completely.

python examples/distributed.py --stream FILE
"""

import codecs
import string
import tempfile
from collections import Counter

import numpy as np
from helpers.book_text import Vocabulary
from helpers.common import ExampleError

CHUNK = 1 << 16  # bytes read at a time

# Each byte becomes a lowercase letter, the end of a line, or a space.
_TABLE = bytearray(b" " * 256)
for _byte in string.ascii_letters.encode():
    _TABLE[_byte] = ord(chr(_byte).lower())
_TABLE[ord("\r")] = _TABLE[ord("\n")] = ord("\n")


def tokenize_file(path):
    """Tokenizes a text file as `book_text.tokenize` does a text.

    Returns:
        The vocabulary, and the tokens as an array of their indices on the disk.
    """
    decoder, state = codecs.getincrementaldecoder("utf-8")(), b""
    counts = Counter()  # in order of appearance, as `Vocabulary` needs them
    with tempfile.TemporaryFile() as file:
        try:
            with open(path, "rb") as text:
                while chunk := text.read(CHUNK):
                    decoder.decode(chunk)
                    tokens, state = tokenize_chunk(chunk, state)
                    file.write(tokens)
                    counts.update(_count(tokens))
            decoder.decode(b"", final=True)
        except OSError as error:
            raise ExampleError(f"{path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise ExampleError(f"{path} must be encoded in UTF-8.") from None
        if not counts:
            raise ExampleError(f"{path} must have letters.")
        file.flush()
        corpus = np.memmap(file, "uint8", "r+")
    vocabulary = Vocabulary(counts)
    index = np.zeros(256, "uint8")
    index[[ord(token) for token in counts]] = vocabulary.encode(counts)
    for start in range(0, len(corpus), CHUNK):
        corpus[start : start + CHUNK] = index[corpus[start : start + CHUNK]]
    return vocabulary, corpus


def tokenize_chunk(chunk, state=b""):
    """Returns the tokens of the next bytes of a text, and the state for the next call.

    Only ASCII letters are tokens, so a chunk may end anywhere, even in a character.
    The state tells if the last line has letters so far, and if it ends with a space.
    """
    lines = (state + chunk.translate(_TABLE)).split(b"\n")
    tokens = b"".join([b" ".join(line.split()) for line in lines])
    next_state = b""
    if lines[-1].strip():
        next_state = b"x " if lines[-1].endswith(b" ") else b"x"
    return tokens[len(state.strip()) :], next_state


def _count(tokens):
    """Counts tokens like `Counter`, but faster."""
    counts = np.bincount(np.frombuffer(tokens, "uint8"), minlength=256)
    present = sorted(np.flatnonzero(counts).tolist(), key=tokens.find)
    return {chr(token): int(counts[token]) for token in present}
