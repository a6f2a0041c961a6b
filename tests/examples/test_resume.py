"""Runs that are killed at random moments, starved of disk, or misled, and resumed."""

import contextlib
import csv
import errno
import http.server
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import book_text
import checkpoint
import keras
import numpy as np
import pytest
import time_machine

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
KILLS = 12 if ON_TENSORFLOW else 5  # and those of the other tests
SMALL = ["--units", "8", "--batch-size", "4", "--num-steps", "5", "--max-tokens", "300"]
EXAMPLES = Path(time_machine.__file__).parent
PATIENCE = 300  # seconds, for a slow machine


@pytest.fixture
def arguments(tmp_path, rng, monkeypatch):
    """Those of a small run, on a text of its own."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    text = tmp_path / "own.txt"
    text.write_text("".join(rng.choice(list("abc \n"), 600)))
    return ["--own-text", str(text), *SMALL]


@pytest.fixture
def processes(monkeypatch):
    """Makes processes that have the example imported, and nothing started."""
    path = [str(EXAMPLES), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["time_machine"])
    started = []

    def start(target, *args):
        process = context.Process(target=target, args=args)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def run(arguments):
    sys.exit(time_machine.main(arguments))


def finish(process):
    process.join(PATIENCE)
    assert process.exitcode == 0


def await_it(process, condition, *args):
    """Waits until something is so, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while not condition(*args) and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def epochs(out, name="scratch"):
    """How many are finished, by the names of the checkpoints."""
    paths = (out / "checkpoints").glob(f"{name}-*.npz")
    return max((int(path.stem.split("-")[-1]) for path in paths), default=0)


def saved(out, name):
    """The content of the last checkpoint, without asking where it is from."""
    last = out / "checkpoints" / f"{name}-{epochs(out, name)}.npz"
    with np.load(last) as file:
        arrays = {key: file[key] for key in file.files}
    header = json.loads(str(arrays.pop("header")))
    return {**header["saved"], "arrays": arrays}


def assert_same(out, straight, name):
    """Bit for bit, but for the times."""
    one, other = saved(out, name), saved(straight, name)
    assert one["arrays"].keys() == other["arrays"].keys()
    for key, array in one["arrays"].items():
        assert array.dtype == other["arrays"][key].dtype
        assert array.tobytes() == other["arrays"][key].tobytes(), key
    assert one["epochs"] == other["epochs"] == len(one["history"]["perplexity"])
    assert one["random"] == other["random"]
    for key in ("loss", "perplexity"):
        assert one["history"][key] == other["history"][key]
    one, other = (keras.saving.load_model(p / f"{name}.keras") for p in (out, straight))
    for weight, expected in zip(one.get_weights(), other.get_weights(), strict=True):
        assert weight.tobytes() == expected.tobytes()
    one, other = (report(folder, name) for folder in (out, straight))
    assert one == other


def report(out, name):
    """What the report has of a run, without the times."""
    runs = json.loads((out / "results.json").read_text())["runs"]
    (results,) = (run for run in runs if run["cell"] == name)
    for key in ("seconds", "tokens_per_sec", "closing_line"):
        assert results.pop(key)
    with open(out / "history.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["cell"] == name]
    return results, [(row["epoch"], row["perplexity"]) for row in rows]


# --- killed ------------------------------------------------------------------


def test_killed_again_and_again(tmp_path, arguments, processes, rng):
    out, straight = tmp_path / "out", tmp_path / "straight"
    arguments = [*arguments, "--cell", "scratch"]
    endless = [*arguments, "--epochs", "1000000", "--out", str(out), "--resume"]

    def is_past(number):
        return epochs(out) > number

    def is_writing():
        return any(out.glob("checkpoints/unfinished-*"))

    before = 0
    for kill in range(KILLS):
        process = processes(run, endless)
        moment = ["anywhere", "after an epoch", "while writing"][kill % 3]
        if moment != "anywhere":
            await_it(process, is_past, before)
        if moment == "while writing":
            await_it(process, is_writing)
        else:
            time.sleep(rng.uniform(0, 3 if moment == "anywhere" else 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        print(f"kill {kill + 1}, {moment}: {epochs(out)} epochs")
        assert epochs(out) >= before
        before = epochs(out)
    assert before >= 2 * KILLS // 3
    last = [*arguments, "--epochs", str(before + 2)]
    finish(processes(run, [*last, "--out", str(out), "--resume"]))
    finish(processes(run, [*last, "--out", str(straight)]))
    assert_same(out, straight, "scratch")
    assert not list(out.rglob("unfinished-*"))


@pytest.mark.one_backend
def test_killed_in_each_cell(tmp_path, arguments, processes):
    out, straight = tmp_path / "out", tmp_path / "straight"
    arguments = [*arguments, "--epochs", "80"]
    resumed = [*arguments, "--out", str(out), "--resume"]
    for name in time_machine.LAYERS:
        process = processes(run, resumed)
        await_it(process, epochs, out, name)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finished = out / "checkpoints" / "scratch-80.npz"
    before = finished.stat()
    finish(processes(run, resumed))
    after = finished.stat()
    # It was not trained again.
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    # The other one as its user starts it.
    subprocess.run(
        [sys.executable, EXAMPLES / "time_machine.py", *arguments, "--out", straight],
        check=True,
        capture_output=True,
        timeout=2 * PATIENCE,
    )
    for name in time_machine.LAYERS:
        assert_same(out, straight, name)


TOUCHES_FILES = {"open", "write", "close", "fsync", "replace", "unlink", "fileno"}


def save(folder, epochs, die_at=None):
    """Saves a checkpoint, and dies at a call of it; gives the names of the calls."""
    calls = []

    def spy(frame, event, function):
        if event in ("c_call", "c_return"):
            if len(calls) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(function.__name__)

    files = checkpoint.Checkpoints(folder, "run", {})
    arrays = [np.full(1000, epochs)]
    content = checkpoint.Saved(epochs, arrays, checkpoint.random_state(), {}, 0.0)
    sys.setprofile(spy)
    try:
        files.save(content)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.one_backend
def test_killed_at_each_call_that_touches_a_file(tmp_path, processes, rng):
    for epochs in (1, 2):
        calls = save(tmp_path, epochs)
    calls = save(tmp_path, 3)
    first = calls.index("open")  # what is written before goes into memory
    touching = [k for k in range(first, len(calls)) if calls[k] in TOUCHES_FILES]
    assert {calls[k] for k in touching} >= {"open", "write", "fsync", "replace"}
    others = rng.choice(len(calls), 5, replace=False)
    found = set()
    for k in sorted({*touching, *others.tolist()}):
        for path in tmp_path.iterdir():
            path.unlink()
        for epochs in (1, 2):
            save(tmp_path, epochs)
        process = processes(save, tmp_path, 3, k)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        last = checkpoint.Checkpoints(tmp_path, "run", {}).load()
        assert last.epochs in (2, 3), calls[k]
        np.testing.assert_array_equal(last.arrays[0], np.full(1000, last.epochs))
        found.add(last.epochs)
        save(tmp_path, 3)  # what the dead one has left is in nobody's way
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["run-2.npz", "run-3.npz"]
    assert found == {2, 3}


# --- refused -----------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.one_backend
def test_what_is_refused_and_what_is_not(tmp_path, arguments, capsys):
    out = tmp_path / "out"
    arguments = [*arguments, "--cell", "layer", "--out", str(out)]
    assert time_machine.main([*arguments, "--epochs", "3", "--resume"]) == 0
    assert "Resumed: nothing is finished" in capsys.readouterr().out
    before = contents(out)
    text = Path(arguments[1])
    changed = tmp_path / "changed.txt"
    changed.write_text(text.read_text().replace("a", "b", 1))
    path = out / "checkpoints" / "layer-3.npz"
    for more, message in [
        (["--seed", "7"], f"{path} is of another run: seed was 2 and is 7."),
        (["--units", "9"], f"{path} is of another run: units was 8 and is 9."),
        (["--own-text", str(changed)], f"{path} is of another run: text was '300 char"),
        (["--epochs", "2"], "--epochs is 2, but 3 of layer are finished."),
    ]:
        answer = time_machine.main([*arguments, "--epochs", "3", *more, "--resume"])
        assert answer.startswith(f"time_machine.py: error: {message}")
        assert "\n" not in answer
        assert contents(out) == before

    # A damaged checkpoint is passed over, and its epoch trained again.
    path.write_bytes(path.read_bytes()[:-100])
    assert time_machine.main([*arguments, "--epochs", "3", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"{path} is damaged, or no checkpoint of this program: passed" in printed
    assert "Resumed: {'layer': 2}" in printed
    with np.load(path) as file, np.load(io.BytesIO(before[path])) as whole:
        for key in set(file.files) - {"header"}:
            np.testing.assert_array_equal(file[key], whole[key])

    # Without --resume, it starts afresh, and the earlier checkpoints are kept.
    earlier = contents(out / "checkpoints")
    assert time_machine.main([*arguments, "--epochs", "1"]) == 0
    aside = out / "checkpoints-1"
    assert f"checkpoints of an earlier one are in {aside}" in capsys.readouterr().out
    assert {aside / path.name: earlier[path] for path in earlier} == contents(aside)
    assert epochs(out, "layer") == 1


@pytest.mark.skipif(not ON_TENSORFLOW, reason="d2l's loop needs tensorflow")
def test_the_books_own_code(tmp_path, arguments):
    pytest.importorskip("d2l.tensorflow", reason="the extra `d2l` is not installed")
    out, straight = tmp_path / "out", tmp_path / "straight"
    arguments = [*arguments, "--cell", "layer", "--compare-d2l"]
    for number in ("1", "3"):
        more = ["--epochs", number, "--out", str(out), "--resume"]
        assert time_machine.main([*arguments, *more]) == 0
    more = ["--epochs", "3", "--out", str(straight)]
    assert time_machine.main([*arguments, *more]) == 0
    one, other = saved(out, "d2l"), saved(straight, "d2l")
    for key, array in one["arrays"].items():
        assert array.tobytes() == other["arrays"][key].tobytes()
    assert one["history"]["perplexity"] == other["history"]["perplexity"]
    assert report(out, "d2l") == report(straight, "d2l")


# --- a loss that is not finite ----------------------------------------------


def test_a_loss_that_is_not_finite(tmp_path, arguments, monkeypatch, capsys):
    """Of two cells, one fails in its third epoch; the other goes on."""
    out = tmp_path / "out"
    layers = {name: time_machine.LAYERS[name] for name in ("scratch", "layer")}
    monkeypatch.setattr(time_machine, "LAYERS", layers)
    reset, kept = time_machine.ResetStates.on_epoch_begin, []

    def spoil(callback, epoch, logs=None):
        reset(callback, epoch, logs)
        model = callback.model
        if epoch == 2 and not kept:
            kept.extend(model.get_weights())
            model.get_layer("logits").bias.assign(np.full_like(kept[-1], np.nan))

    monkeypatch.setattr(time_machine.ResetStates, "on_epoch_begin", spoil)
    answer = time_machine.main([*arguments, "--epochs", "4", "--out", str(out)])
    failure = "the loss of epoch 3 is nan; the weights after epoch 2 are kept"
    assert answer == f"scratch: {failure}."
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["epochs"] for run in runs] == [2, 4]
    assert [run["failure"] for run in runs] == [failure, None]
    weights = keras.saving.load_model(out / "scratch.keras").get_weights()
    for weight, expected in zip(weights, kept, strict=True):
        np.testing.assert_array_equal(weight, expected)


# --- no room -----------------------------------------------------------------


@pytest.fixture
def mount(tmp_path):
    """Mounts a file system in memory, with options of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no right to mount a file system here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@pytest.mark.one_backend
def test_a_full_disk(arguments, mount):
    disk = mount("size=4m")
    out = disk / "out"
    arguments = [*arguments, "--cell", "layer", "--out", str(out), "--resume"]
    assert time_machine.main([*arguments, "--epochs", "2"]) == 0
    before = contents(out)
    filler = disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for more in (["--epochs", "3"], ["--epochs", "2"]):  # a checkpoint, the model
        answer = time_machine.main([*arguments, *more])
        assert re.fullmatch(
            r"time_machine.py: error: \S+ cannot be written: .*No space.*\.", answer
        )
        assert contents(out) == before
    filler.unlink()
    assert time_machine.main([*arguments, "--epochs", "3"]) == 0
    assert epochs(out, "layer") == 3


@pytest.mark.one_backend
def test_a_limit_on_the_size_of_files(tmp_path, arguments):
    out = tmp_path / "out"
    arguments = [*arguments, "--cell", "layer", "--out", str(out), "--resume"]
    assert time_machine.main([*arguments, "--epochs", "2"]) == 0
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    aside = io.StringIO()  # where pytest captures it, the limit holds, too
    try:
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            answer = time_machine.main([*arguments, "--epochs", "3"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = out / "checkpoints" / "layer-3.npz"
    reason = os.strerror(errno.EFBIG)
    assert answer == f"time_machine.py: error: {path} cannot be written: {reason}."
    assert contents(out) == before


@pytest.mark.one_backend
def test_a_folder_that_can_only_be_read(arguments, mount):
    disk = mount("size=1m")
    (disk / "mine").write_text("mine")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    answer = time_machine.main([*arguments, "--out", str(disk)])
    assert answer == (
        f"time_machine.py: error: --out {disk} cannot be written: "
        "Read-only file system."
    )
    assert [path.name for path in disk.iterdir()] == ["mine"]


# --- the text ----------------------------------------------------------------


@pytest.fixture
def serve(monkeypatch):
    """Answers with bytes as they are, as the book's address, and hangs up."""
    servers = []

    def start(answer, seconds=0.0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def handle(self):
                self.rfile.readline()
                self.wfile.write(answer)
                self.wfile.flush()
                time.sleep(seconds)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_port}/timemachine.txt"
        monkeypatch.setattr(book_text, "URL", address)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where Keras would keep the book."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    path = tmp_path / "keras" / "datasets" / "timemachine.txt"
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\n<html>Please log in</html>",
        b"HTTP/1.0 200 OK\r\nContent-Length: 179520\r\n\r\nThe Time Machine",
    ],
    ids=["wrong", "cut short"],
)
def test_a_wrong_download_ends_the_run(tmp_path, cache, serve, answer):
    serve(answer)
    out = tmp_path / "out"
    message = time_machine.main([*SMALL, "--out", str(out)])
    assert re.match(
        r"time_machine.py: error: http://127\S+ is not the book's text: its SHA-256 is "
        r"\w+, expected \w+\.$",
        message,
    )
    assert not out.exists()
    assert not list(cache.parent.iterdir())


@pytest.mark.one_backend
def test_a_cache_file_that_is_cut_short_ends_the_run(tmp_path, cache):
    cache.write_bytes(b"The Time Machine, by H. G. We")
    out = tmp_path / "out"
    message = time_machine.main([*SMALL, "--out", str(out)])
    assert message.startswith(
        f"time_machine.py: error: {cache} is not the book's text: its SHA-256 is "
    )
    assert "\n" not in message
    assert not out.exists()
    assert cache.read_bytes() == b"The Time Machine, by H. G. We"


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (b"", 1),
        (b"", 0),
        (b"no HTTP at all\r\n", 0),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nThe Ti", 0),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", 0),
    ],
    ids=["silent", "hung up", "no HTTP", "cut in a chunk", "not found"],
)
def test_no_download_is_no_harm(cache, serve, monkeypatch, answer, seconds):
    monkeypatch.setattr(book_text, "DOWNLOAD_SECONDS", 1.0)
    serve(answer, seconds)
    text = book_text.load_text()
    assert text.source == str(book_text.BUNDLED)
    assert not list(cache.parent.iterdir())


@pytest.mark.one_backend
def test_a_cache_without_room_is_left_as_it_is(cache, monkeypatch, mount):
    disk = mount("size=16k")
    monkeypatch.setattr(book_text, "_cache", lambda: disk)
    book_text._keep(bytes(100_000), disk / "timemachine.txt")
    assert not list(disk.iterdir())
