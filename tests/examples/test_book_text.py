import http.server
import random
import threading
import time

import book_text
import keras
import numpy as np
import pytest
from book_text import (
    Minibatches,
    TextError,
    Vocabulary,
    load_own_text,
    load_text,
    random_batches,
    sequential_batches,
    tokenize,
)

pytestmark = pytest.mark.one_backend


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A Keras cache of the test's own, and no download but the test's own."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(book_text, "URL", "http://127.0.0.1:9/timemachine.txt")
    return tmp_path / "keras" / "datasets" / "timemachine.txt"


@pytest.fixture
def serve(monkeypatch):
    """Serves chunks of bytes, with a pause after each, as the book's address."""
    servers = []

    def start(chunks, pause=0.0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                for chunk in chunks:
                    try:
                        self.wfile.write(chunk)
                        self.wfile.flush()
                    except OSError:
                        return
                    time.sleep(pause)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(
            book_text, "URL", f"http://127.0.0.1:{server.server_port}/timemachine.txt"
        )

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# --- where the text comes from -----------------------------------------------


def test_from_a_path(book):
    text = load_text(book)
    assert text.is_the_book
    assert text.source == str(book)
    assert text.characters.startswith("The Time Machine")


def test_from_the_cache(book, empty_cache):
    empty_cache.parent.mkdir(parents=True)
    empty_cache.write_bytes(book.read_bytes())
    assert load_text() == load_text(book)._replace(source=str(empty_cache))


def test_downloaded_and_kept(book, empty_cache, serve):
    serve([book.read_bytes()])
    assert load_text().is_the_book
    assert empty_cache.read_bytes() == book.read_bytes()
    assert [file.name for file in empty_cache.parent.iterdir()] == ["timemachine.txt"]


def test_keras_finds_the_kept_file(book, empty_cache, serve):
    serve([book.read_bytes()])
    load_text()
    # Nobody serves this address, so the file must come from the cache.
    path = keras.utils.get_file(
        "timemachine.txt",
        "http://127.0.0.1:9/",
        file_hash=book_text.SHA256,
        cache_dir=empty_cache.parents[1],
    )
    assert str(path) == str(empty_cache)


def test_a_story_where_there_is_no_book(empty_cache):
    text = load_text()
    assert not text.is_the_book
    assert text.source.endswith("time_traveller.txt")
    assert sum(character.isalpha() for character in text.characters) >= 12_000
    assert text.characters.isascii()
    assert not empty_cache.exists()


@pytest.mark.parametrize("chunks", [[], [b"a"] * 100], ids=["silent", "dripping"])
def test_a_download_that_stalls_is_given_up(serve, monkeypatch, chunks):
    monkeypatch.setattr(book_text, "DOWNLOAD_SECONDS", 0.3)
    serve([b"", *chunks], pause=0.1 if chunks else 3)
    assert not load_text().is_the_book


def test_a_wrong_download_is_refused(serve, empty_cache):
    serve([b"something else"])
    with pytest.raises(TextError, match=r"^http.* is not the book's text: its SHA-256"):
        load_text()
    assert not empty_cache.exists()


def test_a_wrong_file_is_refused(book, tmp_path, empty_cache):
    empty_cache.parent.mkdir(parents=True)
    for path, source in [(tmp_path / "cut.txt", "path"), (empty_cache, "cache")]:
        path.write_bytes(book.read_bytes()[:-1])
        with pytest.raises(TextError, match="is not the book's text") as error:
            load_text(path if source == "path" else None)
        assert str(path) in str(error.value)
        assert path.exists()


def test_a_file_that_cannot_be_read(tmp_path):
    for load in (load_text, load_own_text):
        with pytest.raises(TextError, match="cannot be read: No such file"):
            load(tmp_path / "missing.txt")
        with pytest.raises(TextError, match="cannot be read: Is a directory"):
            load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="binary is no text in UTF-8"):
        load_own_text(tmp_path / "binary")


# --- tokens ------------------------------------------------------------------


def test_tokens_are_letters_and_spaces_between():
    tokens = tokenize("  The Time-Machine,\r\nby H. G. Wells [1898]\n\nI\r")
    assert "".join(tokens) == "the time machineby h g wellsi"


def test_the_vocabulary_is_by_frequency_and_then_by_appearance():
    vocabulary = Vocabulary("hello world")
    assert vocabulary.tokens == ["<unk>", *"lohe wrd"]
    np.testing.assert_array_equal(vocabulary.encode("lox"), [1, 2, 0])
    assert vocabulary.decode([3, 4, 1, 1, 2]) == "hello"


def test_the_books_figures(book):
    tokens = tokenize(load_text(book).characters)
    assert len(tokens) == 170_580
    assert len(Vocabulary(tokens)) == 28


# --- minibatches -------------------------------------------------------------


@pytest.mark.parametrize("form", [sequential_batches, random_batches])
def test_y_is_one_token_ahead(form, seed):
    x, y = form(np.arange(1000), 4, 7, random.Random(seed))
    assert x.shape == y.shape
    assert x.shape[1:] == (4, 7)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(np.diff(x, axis=-1), 1)


def test_a_row_goes_on_in_the_next_sequential_minibatch(seed):
    x, y = sequential_batches(np.arange(1000), 4, 7, random.Random(seed))
    np.testing.assert_array_equal(x[1:, :, 0], y[:-1, :, -1])


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_the_stream_is_the_epochs_one_after_the_other(sampling):
    batches = Minibatches(np.arange(10_000), 32, 35, sampling, seed=5)
    assert batches.steps_per_epoch == 8
    stream = [batches[k] for k in range(24)]
    for epoch in range(3):
        x, y = batches.epoch(epoch)
        assert len(x) == 8
        for step in range(8):
            np.testing.assert_array_equal(stream[8 * epoch + step][0], x[step])
            np.testing.assert_array_equal(stream[8 * epoch + step][1], y[step])
    offsets = {int(batches.epoch(epoch)[0].min()) for epoch in range(50)}
    assert len(offsets) > 10
    again = Minibatches(np.arange(10_000), 32, 35, sampling, seed=5)
    np.testing.assert_array_equal(again[17][0], stream[17][0])
    other = Minibatches(np.arange(10_000), 32, 35, sampling, seed=6)
    assert any((other[k][0] != stream[k][0]).any() for k in range(24))


@pytest.mark.parametrize(
    ("sampling", "needed"), [("sequential", 4 * 7 + 8), ("random", 4 * 7 + 7)]
)
def test_the_shortest_text(sampling, needed):
    batches = Minibatches(np.arange(needed), 4, 7, sampling, seed=0)
    assert batches.steps_per_epoch == 1
    # At every offset there is a minibatch.
    assert all(len(batches.epoch(epoch)[0]) == 1 for epoch in range(100))
    message = f"has {needed - 1} characters; .* 4 x 7 needs at least {needed}"
    with pytest.raises(TextError, match=message):
        Minibatches(np.arange(needed - 1), 4, 7, sampling, seed=0)
