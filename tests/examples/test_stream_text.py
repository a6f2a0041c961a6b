import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers import stream_text
from helpers.book_text import Vocabulary, tokenize
from helpers.common import ExampleError
from helpers.stream_text import tokenize_chunk, tokenize_file
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import run_python

ALPHABET = "abcXYZ  \n\r\t.,-'0é™日\u2028\ufeff\U0001f600"
MB = 1 << 20
pytestmark = pytest.mark.one_backend


@settings(deadline=None, print_blob=True)
@given(st.text(ALPHABET, max_size=40), st.lists(st.integers(0, 60), max_size=5))
def test_chunks_give_the_tokens_of_the_text(text, cuts):
    content = text.encode()
    cuts = [0, *sorted(cuts), len(content)]
    found, state = b"", b""
    for start, end in itertools.pairwise(cuts):
        tokens, state = tokenize_chunk(content[start:end], state)
        found += tokens
    assert list(found.decode()) == tokenize(text)


@pytest.mark.parametrize("source", ["random text", "book"])
def test_file_has_the_tokens_of_the_text(source, tmp_path, rng, monkeypatch, request):
    path = tmp_path / "text.txt"
    if source == "book":
        path = request.getfixturevalue("book")
    else:
        monkeypatch.setattr(stream_text, "CHUNK", 7)
        path.write_text("".join(rng.choice(list(ALPHABET), 3000)), "utf-8", newline="")
    tokens = tokenize(path.read_bytes().decode())
    expected = Vocabulary(tokens)
    vocabulary, corpus = tokenize_file(path)
    assert vocabulary.tokens == expected.tokens
    np.testing.assert_array_equal(corpus, expected.encode(tokens))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("é".encode("latin-1") * 5, "must be encoded in UTF-8"),
        ("caf é".encode()[:-1], "must be encoded in UTF-8"),
        (b"1, 2\n", "must have letters"),
    ],
)
def test_unreadable_files(tmp_path, content, match):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ExampleError, match=match):
        tokenize_file(tmp_path / "text.txt")


MEASURE = """
import sys
from pathlib import Path
from helpers.book_text import Minibatches
from helpers.stream_text import tokenize_file

def anonymous_memory():  # the pages of the file of tokens are the system's cache
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "RssAnon" in line) * 1024

memory = []
for path in sys.argv[1:]:
    _, corpus = tokenize_file(path)
    memory.append(anonymous_memory())
    batches = Minibatches(corpus, 64, 250, "sequential", seed=0)
    tokens = sum(batches[k][0].size for k in range(batches.steps_per_epoch))
    memory.append(anonymous_memory())
print(len(corpus), tokens, max(memory[2:]) - max(memory[:2]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_text(tmp_path, rng):
    words = ["".join(rng.choice(list("abcdefghij"), n)) for n in rng.integers(1, 9, 50)]
    block = "".join(" ".join(rng.choice(words, 12)) + ", 日本\r\n" for _ in range(9999))
    repeats = {"small.txt": 4, "large.txt": (150 * MB) // len(block.encode())}
    for name, count in repeats.items():
        with open(tmp_path / name, "wb") as file:
            for _ in range(count):
                file.write(block.encode())
    paths = [tmp_path / name for name in repeats]
    folder = Path(stream_text.__file__).parents[1]
    printed = run_python("-c", MEASURE, *paths, PYTHONPATH=str(folder))
    for path in paths:
        path.unlink()
    length, tokens, growth = map(int, printed.split()[-3:])
    assert length == repeats["large.txt"] * len(tokenize(block))
    assert 0 <= length - tokens < 65 * 251  # what does not fill a batch
    assert growth < 30 * MB
