import os
import stat
import sys
import threading

import numpy as np
import pytest

from keras_scratch_lstm import GateTrace
from keras_scratch_lstm.tracing import files
from keras_scratch_lstm.tracing.trace import ARRAYS

pytestmark = pytest.mark.one_backend


def change(trace, **changes):
    return GateTrace(**vars(trace) | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"f": None}, "`f` must be float32 or float64, of .* Received: f=None"),
        ({"f": np.zeros((2, 3, 4), "float16")}, "`f` must be .*dtype float16"),
        ({"f": np.zeros((2, 2, 4))}, r"`f` must be .* shape \(batch, time, units\)"),
        (dict.fromkeys(ARRAYS, np.zeros((3, 4))), r"`i` must be .* shape \(3, 4\)"),
        ({"mask": np.ones((2, 3))}, r"`mask` must be a boolean array of shape \(2, 3"),
        ({"mask": np.ones((2, 2), bool)}, r"`mask` must be a boolean array of shape"),
        ({"layer": b"lstm"}, "`layer` must be a string"),
        ({"backward": 3}, "`backward` must be a `GateTrace` without `backward`"),
    ],
)
def test_invalid_attributes(changes, match, trace):
    with pytest.raises(ValueError, match=match):
        change(trace, **changes)
    with pytest.raises(ValueError, match="without `backward`"):
        change(trace, backward=change(trace, backward=trace))


def test_repr(trace):
    masked = change(trace, mask=np.ones((2, 3), bool), layer="", backward=trace)
    expected = "GateTrace(layer='', batch=2, time=3, units=4, masked, backward=…)"
    assert repr(masked) == expected


# --- summaries ---------------------------------------------------------------


def test_saturation(trace):
    trace.f[:] = 0.5
    trace.f[0, :, 0] = [0.05, 0.95, 0.99]
    trace.f[1, :, 0] = [0.1, 0.9, np.nan]  # the thresholds themselves do not count
    mask = np.array([[True] * 3, [True, True, False]])
    saturation = change(trace, mask=mask).saturation()
    assert list(saturation) == ["i", "f", "o"]
    np.testing.assert_allclose(saturation["f"].left, [1 / 5, 0, 0, 0])
    np.testing.assert_allclose(saturation["f"].right, [2 / 5, 0, 0, 0])
    np.testing.assert_allclose(trace.saturation()["f"].right, [2 / 6, 0, 0, 0])
    assert np.isnan(change(trace, mask=mask & False).saturation()["f"].right).all()


@pytest.mark.parametrize(("masked", "array"), [(False, "c"), (True, "f")])
def test_correlate_matches_numpy(masked, array, rng):
    shape = 3, 50, 4
    arrays = {name: rng.normal(size=shape).astype("float32") for name in ARRAYS}
    mask = rng.random(shape[:2]) < (0.7 if masked else 1)
    arrays[array][~mask] = np.nan
    arrays[array][..., 3] = np.float32(0.1)  # constant
    features = {
        "boolean": rng.random(shape[:2]) < 0.3,
        "per time step": np.arange(50),
        "constant": np.full(50, 0.1),
        "list": [float(t % 7) for t in range(50)],
        "missing": np.where(rng.random(shape[:2]) < 0.2, np.nan, np.arange(50.0)),
    }
    trace = GateTrace(**arrays, mask=mask if masked else None)
    correlations = trace.correlate(features, *([] if array == "c" else [array]))
    assert list(correlations) == list(features)
    for name, feature in features.items():
        feature = np.broadcast_to(feature, shape[:2]).astype("float64")
        known = mask & ~np.isnan(feature)
        feature = feature[known]
        expected = np.full(4, np.nan)
        for unit in range(0 if name == "constant" else 3):
            values = arrays[array][..., unit][known].astype("float64")
            expected[unit] = np.corrcoef(feature, values)[0, 1]
        np.testing.assert_allclose(correlations[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "array", "match"),
    [
        ({"a": np.zeros(4)}, "c", r"`features\['a'\]` must be .* \(3,\) or \(2, 3"),
        ({"a": ["x", "y", "z"]}, "c", "must be booleans or numbers .*dtype <U1"),
        (np.zeros((2, 3)), "c", "`features` must be a dict .*=array of shape"),
        ({}, "g", "`array` must be one of 'i', 'f', 'o', 'c_tilde', 'c', 'h'"),
    ],
)
def test_invalid_features(features, array, match, trace):
    with pytest.raises(ValueError, match=match):
        trace.correlate(features, array)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["abc", ["x", "", "<unk>"]], ["a", "b", "c", "x", "", "<unk>"]),
        (None, [np.nan] * 6),
    ],
)
def test_dataframe_has_a_row_per_value(tokens, expected, trace, monkeypatch):
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = trace.to_dataframe(tokens=tokens)
    assert list(frame) == ["sample", "step", "token", "unit", "gate", "value"]
    assert len(frame) == 2 * 3 * 4 * 6
    for name in ARRAYS:
        one = frame[frame.gate == name].set_index(["sample", "step", "unit"]).value
        values = getattr(trace, name)
        assert all(one[index] == values[index] for index in np.ndindex(values.shape))
    found = frame.drop_duplicates(["sample", "step"]).token.tolist()
    assert list(map(str, found)) == list(map(str, expected))
    with pytest.raises(ValueError, match="`tokens` must have 3 tokens"):
        trace.to_dataframe("ab")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="`to_dataframe` needs pandas: run `pip inst"):
        trace.to_dataframe()


# --- files -------------------------------------------------------------------


def test_save_and_load(trace, tmp_path):
    arrays = {name: getattr(trace, name).astype("float64") for name in ARRAYS}
    mask = np.array([[True, False, True]] * 2)
    saved = GateTrace(**arrays, mask=mask, layer="fôrward", backward=trace)
    path = tmp_path / "trace.npz"
    path.write_bytes(b"previous content")
    saved.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
    loaded = GateTrace.load(path)
    for one, other in ((saved, loaded), (saved.backward, loaded.backward)):
        for name in (*ARRAYS, "mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.layer == other.layer
        assert one.i.dtype == other.i.dtype
    assert loaded.backward.backward is None


@pytest.mark.parametrize(
    ("mode", "links"), [(None, 0), (0o640, 1), (0o604, 2), (None, 2)]
)
def test_files_keep_links_and_mode(mode, links, trace, tmp_path):
    target = path = tmp_path / "folder" / "file"
    target.parent.mkdir()
    for number in range(links):
        link = tmp_path / f"link{number}"
        link.symlink_to(os.path.relpath(path, tmp_path) if number else path)
        path = link
    umask = os.umask(0o027)
    try:
        if mode is not None:
            target.write_bytes(b"previous content")
            target.chmod(mode)
        trace.save(path)
    finally:
        os.umask(umask)
    assert GateTrace.load(target).layer == "lstm"
    assert stat.S_IMODE(target.stat().st_mode) == (mode or 0o640)
    assert all((tmp_path / f"link{k}").is_symlink() for k in range(links))
    assert list(target.parent.iterdir()) == [target]


def test_long_file_names_and_hard_links(trace, tmp_path):
    path, link = tmp_path / ("x" * 255), tmp_path / "link"
    for _ in range(2):  # new, and with a hard link
        trace.save(path)
        assert GateTrace.load(path).layer == "lstm"
        if not link.exists():
            os.link(path, link)
            path.write_bytes(b"previous content")
    assert sorted(tmp_path.iterdir()) == [link, path]
    assert path.samefile(link)


def test_devices_and_named_pipes_are_written_to(trace, tmp_path):
    link, pipe, copy = tmp_path / "device", tmp_path / "pipe", tmp_path / "copy"
    link.symlink_to("/dev/null")
    before = os.stat("/dev/null")
    trace.save(link)
    after = os.stat("/dev/null")
    assert (after.st_rdev, after.st_mode) == (before.st_rdev, before.st_mode)
    assert os.readlink(link) == "/dev/null"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: copy.write_bytes(pipe.read_bytes()))
    reader.start()
    trace.save(pipe)
    reader.join(60)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert GateTrace.load(copy).layer == "lstm"
    with open(copy, "wb") as file:
        trace.save(f"/dev/fd/{file.fileno()}")
        assert os.fstat(file.fileno()).st_ino == copy.stat().st_ino
    assert GateTrace.load(copy).layer == "lstm"


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("folder", IsADirectoryError, "folder"),
        ("missing/file", FileNotFoundError, "missing"),
        ("loop", OSError, "symbolic links"),
        (b"trace.npz", ValueError, "`path` must be"),
        ("a\0b", ValueError, "`path` must be"),
    ],
)
def test_invalid_path_changes_nothing(path, error, match, trace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for write in (trace.save, trace.to_html):
        with pytest.raises(error, match=match):
            write(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "loop"]


@pytest.mark.parametrize("method", ["save", "to_html"])
def test_read_only_file_is_not_replaced(method, trace, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"previous content")
    path.chmod(0o440)

    def open_as_user(file, mode, *args):
        if "+" in mode and not os.stat(file).st_mode & stat.S_IWUSR:
            raise PermissionError("read-only")  # what root is not told
        return open(file, mode, *args)

    monkeypatch.setattr(files, "open", open_as_user, raising=False)
    with pytest.raises(PermissionError):
        getattr(trace, method)(path)
    assert path.read_bytes() == b"previous content"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"previous content")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_file(path, write)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"previous content"


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing", FileNotFoundError),
        ("", IsADirectoryError),
        ("/dev/zero", ValueError),
        ("pipe", ValueError),
        ([], ValueError),
    ],
)
def test_load_of_an_invalid_path(path, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(error):
        GateTrace.load(path)
