import http.client
import io
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
from helpers import book_text
from helpers.book_text import Minibatches, Vocabulary, load_text, tokenize
from helpers.common import ExampleError

pytestmark = pytest.mark.one_backend
FAILURES = {
    "no network": urllib.error.URLError("no network"),
    "hung up": http.client.BadStatusLine(""),
    "login page": b"<html>Please log in</html>",
    "truncated": b"The Time",
}


@pytest.fixture(autouse=True)
def cached(tmp_path, monkeypatch):
    """The path of the book in an empty cache."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "datasets" / "timemachine.txt"


@pytest.fixture(autouse=True)
def serve(monkeypatch):
    """Answers a download by some content or an error; by default, by an error."""

    def start(answer):
        def urlopen(url, timeout):
            if isinstance(answer, Exception):
                raise answer
            return io.BytesIO(answer)

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    start(FAILURES["no network"])
    return start


# --- text --------------------------------------------------------------------


def test_text_from_path_and_from_cache(book, cached):
    text = load_text(book)
    assert text.is_the_book
    assert text.source == str(book)
    assert text.characters.startswith("The Time Machine")
    cached.parent.mkdir(parents=True)
    cached.write_bytes(book.read_bytes())
    assert load_text() == text._replace(source=str(cached))


def test_downloaded_text_is_cached_if_it_can_be(book, cached, serve):
    serve(book.read_bytes())
    assert load_text().is_the_book
    assert cached.read_bytes() == book.read_bytes()
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    shutil.rmtree(cached.parents[1])
    cached.parents[1].write_text("a file where the folder should be")
    assert load_text().is_the_book


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_download_falls_back_to_bundled_story(failure, cached, serve):
    serve(FAILURES[failure])
    text = load_text()
    assert not text.is_the_book
    assert text.source == str(book_text.BUNDLED)
    assert sum(character.isalpha() for character in text.characters) >= 12_000
    assert text.characters.isascii()
    assert not cached.exists()


def test_slow_download_falls_back_to_bundled_story(book, serve, monkeypatch):
    monkeypatch.setattr(book_text, "DOWNLOAD_SECONDS", -1)
    serve(book.read_bytes())
    assert not load_text().is_the_book


def test_truncated_cache_is_replaced(book, cached, serve):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(book.read_bytes()[:-1])
    assert not load_text(cached).is_the_book
    serve(book.read_bytes())
    assert load_text().is_the_book
    assert cached.read_bytes() == book.read_bytes()


# --- tokens ------------------------------------------------------------------


def test_tokens_are_lowercase_letters_and_single_spaces():
    tokens = tokenize("  The Time-Machine,\r\nby H. G. Wells [1898]\n\nI\r")
    assert "".join(tokens) == "the time machineby h g wellsi"


def test_vocabulary_is_sorted_by_frequency_then_by_appearance():
    vocabulary = Vocabulary("hello world")
    assert vocabulary.tokens == ["<unk>", *"lohe wrd"]
    np.testing.assert_array_equal(vocabulary.encode("lox"), [1, 2, 0])
    assert vocabulary.decode([3, 4, 1, 1, 2]) == "hello"


# --- minibatches -------------------------------------------------------------

SAMPLINGS = pytest.mark.parametrize("sampling", ["sequential", "random"])


@SAMPLINGS
def test_targets_are_one_token_ahead(sampling, seed):
    batches = Minibatches(np.arange(1000), 4, 7, sampling, seed)
    ends = None
    for k in range(2 * batches.steps_per_epoch):
        x, y = batches[k]
        assert x.shape == y.shape == (4, 7)
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(np.diff(x, axis=-1), 1)
        if sampling == "sequential" and k % batches.steps_per_epoch:
            np.testing.assert_array_equal(x[:, 0], ends)
        ends = y[:, -1]


@SAMPLINGS
def test_batches_depend_only_on_seed_and_epoch(sampling):
    def stream(seed, first_epoch=0, rows=slice(None)):
        batches = Minibatches(np.arange(10_000), 32, 35, sampling, seed)
        assert batches.steps_per_epoch == 8
        batches.first_epoch, batches.rows = first_epoch, rows
        return np.array([batches[k][0] for k in range(24)])

    batches = stream(5)
    np.testing.assert_array_equal(stream(5, first_epoch=2)[:8], batches[16:])
    np.testing.assert_array_equal(stream(5, rows=slice(8, 16)), batches[:, 8:16])
    assert (stream(6) != batches).any()
    for k in range(2):  # No window comes twice in an epoch, and no epoch twice.
        epoch, following = batches[8 * k : 8 * (k + 1)], batches[8 * (k + 1) :][:8]
        assert len(np.unique(epoch)) == epoch.size
        assert (epoch != following).any()


@pytest.mark.parametrize(
    ("sampling", "needed"), [("sequential", 4 * 7 + 8), ("random", 4 * 7 + 7)]
)
def test_shortest_text(sampling, needed):
    batches = Minibatches(np.arange(needed), 4, 7, sampling, seed=0)
    assert batches.steps_per_epoch == 1
    # Each offset gives a complete batch.
    assert all(batches[epoch][1].max() < needed for epoch in range(100))
    match = f"least {needed} characters for a batch of 4 x 7. Received: {needed - 1}"
    with pytest.raises(ExampleError, match=match):
        Minibatches(np.arange(needed - 1), 4, 7, sampling, seed=0)
