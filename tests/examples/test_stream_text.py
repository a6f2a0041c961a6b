import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import stream_text
from book_text import Minibatches, TextError, Vocabulary, tokenize
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_text import TextFile, clean

ALPHABET = "abcXYZ  \n\r\t.,-'0é™日\u2028\ufeff\U0001f600"
MB = 1 << 20


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces and blocks so small that everything is cut somewhere."""
    monkeypatch.setattr(stream_text, "PIECE", 7)
    monkeypatch.setattr(stream_text, "BLOCK", 6)


@pytest.fixture
def text(tmp_path, rng):
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice(list(ALPHABET), 3000)), "utf-8", newline="")
    return path


def corpus_of(path):
    tokens = tokenize(path.read_bytes().decode())
    vocabulary = Vocabulary(tokens)
    return vocabulary, vocabulary.encode(tokens)


def batches(dataset, count):
    found = list(dataset.take(count).as_numpy_iterator())
    return tuple(np.stack(arrays) for arrays in zip(*found, strict=True))


@settings(deadline=None, print_blob=True)
@given(st.text(ALPHABET, max_size=40), st.lists(st.integers(0, 60), max_size=5))
def test_pieces_give_the_tokens_of_the_whole(text, cuts):
    content = text.encode()
    cuts = [0, *sorted(cuts), len(content)]
    found, before = b"", b""
    for start, end in itertools.pairwise(cuts):
        tokens, before = clean(content[start:end], before)
        found += tokens
    assert list(found.decode()) == tokenize(text)


def test_the_vocabulary_is_that_of_the_text_in_memory(text, small_pieces):
    vocabulary, corpus = corpus_of(text)
    streamed = TextFile(text)
    assert streamed.vocabulary.tokens == vocabulary.tokens
    assert len(streamed) == len(corpus)


def test_sequential_minibatches_are_those_of_the_text_in_memory(text, small_pieces):
    _, corpus = corpus_of(text)
    in_memory = Minibatches(corpus, 4, 5, "sequential", seed=3)
    dataset, steps = stream_text.stream(TextFile(text), 4, 5, "sequential", seed=3)
    assert steps == in_memory.steps_per_epoch
    x, y = batches(dataset, 3 * steps)
    for epoch in range(3):
        expected_x, expected_y = in_memory.epoch(epoch)
        mine = slice(epoch * steps, (epoch + 1) * steps)
        np.testing.assert_array_equal(x[mine], expected_x)
        np.testing.assert_array_equal(y[mine], expected_y)


def test_random_minibatches_have_the_windows_of_the_text_in_memory(text, small_pieces):
    _, corpus = corpus_of(text)
    in_memory = Minibatches(corpus, 1, 5, "random", seed=3)
    dataset, steps = stream_text.stream(TextFile(text), 1, 5, "random", seed=3)
    assert steps == in_memory.steps_per_epoch
    x, y = batches(dataset, 2 * steps)
    orders = []
    for epoch in range(2):
        rng = stream_text.random.Random(f"3 {epoch}")
        offset = rng.randint(0, 4)
        mine = slice(epoch * steps, (epoch + 1) * steps)
        pairs = np.concatenate([x[mine, 0], y[mine, 0]], -1)
        count = (len(corpus) - offset - 1) // 5
        windows = [
            [*corpus[k : k + 5], *corpus[k + 1 : k + 6]]
            for k in range(offset, offset + 5 * count, 5)
        ]
        # One more than an epoch has, where the offset is early.
        left = sorted(map(tuple, windows))
        for pair in pairs.tolist():
            left.remove(tuple(pair))
        assert len(left) == count - steps
        orders.append([windows.index(pair) for pair in pairs.tolist()])
    assert all(order != sorted(order) for order in orders)
    again, _ = stream_text.stream(TextFile(text), 1, 5, "random", seed=3)
    np.testing.assert_array_equal(batches(again, 2 * steps)[0], x)


def test_the_book_is_the_same(book):
    vocabulary, corpus = corpus_of(book)
    streamed = TextFile(book)
    assert streamed.vocabulary.tokens == vocabulary.tokens
    dataset, steps = stream_text.stream(streamed, 32, 35, "sequential", seed=0)
    x, y = batches(dataset, steps)
    expected_x, expected_y = Minibatches(corpus, 32, 35, "sequential", 0).epoch(0)
    np.testing.assert_array_equal(x, expected_x)
    np.testing.assert_array_equal(y, expected_y)


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(TextError, match=r"text\.txt cannot be read: No such file"):
        TextFile(path)
    path.write_bytes("é".encode("latin-1") * 5)
    with pytest.raises(TextError, match=r"text\.txt is no text in UTF-8\.$"):
        TextFile(path)
    path.write_bytes("caf é".encode()[:-1])  # cut short
    with pytest.raises(TextError, match=r"text\.txt is no text in UTF-8\.$"):
        TextFile(path)
    path.write_text("too short")
    with pytest.raises(TextError, match="the text has 9 characters; a minibatch"):
        stream_text.stream(TextFile(path), 4, 5, "random", seed=0)


def test_a_file_that_has_changed_is_a_sentence(text):
    streamed = TextFile(text)
    text.write_text("abc")
    for number in (0, 7):
        with (
            pytest.raises(TextError, match="has changed while it was in use"),
            streamed.open() as file,
        ):
            streamed.piece(file, number)


MEASURE = """
    import json, sys, time
    from pathlib import Path
    from stream_text import TextFile, stream

    def used():
        # `ru_maxrss` would begin at what the parent process has in use.
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
        return int(peak) * 1024, time.process_time()

    def whole(path):  # one epoch, to its end
        dataset, steps = stream(TextFile(path), 64, 250, "sequential", seed=0)
        tokens = sum(x.shape.num_elements() for x, y in dataset.take(steps))
        return steps, tokens

    whole(sys.argv[1])  # the same with little, for what is taken once
    before = used()
    steps, tokens = whole(sys.argv[2])
    growth, seconds = (after - b for after, b in zip(used(), before, strict=True))
    found = {"steps": steps, "tokens": tokens, "growth": growth, "cpu": seconds}
    print(json.dumps(found))
"""


@pytest.mark.one_backend
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_flat_over_a_gigabyte(tmp_path, rng):
    words = ["".join(rng.choice(list("abcdefghij"), n)) for n in rng.integers(1, 9, 50)]
    block = bytearray()
    while len(block) < MB:
        line = " ".join(rng.choice(words, 12)) + ", 日本\r\n"
        block += line.encode()
    tokens = len(tokenize(block.decode()))
    paths = tmp_path / "small.txt", tmp_path / "large.txt"
    repeats = 4, 1 + (1000 * MB) // len(block)
    try:
        for path, times in zip(paths, repeats, strict=True):
            with open(path, "wb") as file:
                for _ in range(times):
                    file.write(block)
        size = paths[1].stat().st_size
        measured = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, paths)],
            cwd=stream_text.__file__.rpartition("/")[0],
            capture_output=True,
            text=True,
            timeout=900,
        )
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout.splitlines()[-1])
    print(size, found)
    assert size >= 1000 * MB
    assert found["tokens"] == found["steps"] * 64 * 250
    # All but what does not fill a row of windows.
    assert 0 <= repeats[1] * tokens - found["tokens"] < 64 * 251 + 251
    assert found["growth"] < 200 * MB
