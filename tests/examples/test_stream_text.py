import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import stream_text
from book_text import Vocabulary, tokenize
from common import ExampleError
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_text import tokenize_chunk, tokenize_file

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
        (None, "cannot be read: No such file"),
        ("é".encode("latin-1") * 5, "must be encoded in UTF-8"),
        ("caf é".encode()[:-1], "must be encoded in UTF-8"),
        (b"1, 2\n", "must have letters"),
    ],
)
def test_unreadable_files(tmp_path, content, match):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExampleError, match=match):
        tokenize_file(path)


MEASURE = """
    import json, sys
    from pathlib import Path
    from book_text import Minibatches
    from stream_text import tokenize_file

    def peak():
        # Anonymous memory: the pages of the file of tokens are the system's cache.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if "RssAnon" in line) * 1024

    def read(path):
        _, corpus = tokenize_file(path)
        before = peak()
        batches = Minibatches(corpus, 64, 250, "sequential", seed=0)
        tokens = sum(batches[k][0].size for k in range(batches.steps_per_epoch))
        return len(corpus), tokens, max(before, peak())

    _, _, before = read(sys.argv[1])
    length, tokens, after = read(sys.argv[2])
    print(json.dumps({"length": length, "tokens": tokens, "growth": after - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_text(tmp_path, rng):
    words = ["".join(rng.choice(list("abcdefghij"), n)) for n in rng.integers(1, 9, 50)]
    block = bytearray()
    while len(block) < MB:
        block += (" ".join(rng.choice(words, 12)) + ", 日本\r\n").encode()
    repeats = {"small.txt": 4, "large.txt": 1 + (1000 * MB) // len(block)}
    for name, count in repeats.items():
        with open(tmp_path / name, "wb") as file:
            for _ in range(count):
                file.write(block)
    measured = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(MEASURE)),
            *(str(tmp_path / name) for name in repeats),
        ],
        cwd=Path(stream_text.__file__).parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    for name in repeats:
        (tmp_path / name).unlink()
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout.splitlines()[-1])
    assert found["length"] == repeats["large.txt"] * len(tokenize(block.decode()))
    # All but the rest, which does not fill a batch.
    assert 0 <= found["length"] - found["tokens"] < 64 * 251 + 251
    assert found["growth"] < 200 * MB
