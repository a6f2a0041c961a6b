import os
import re

import numpy as np
import pytest

from keras_scratch_lstm import GateTrace
from keras_scratch_lstm.tracing import trace as trace_file
from keras_scratch_lstm.tracing.trace import ARRAYS

# --- GateTrace ---------------------------------------------------------------


def test_saturation_by_hand(trace):
    trace.f[:] = 0.5
    trace.f[0, :, 0] = [0.05, 0.95, 0.99]
    trace.f[1, :, 0] = [0.1, 0.9, 0.0]  # at the bound is not beyond it
    left, right = trace.saturation()["f"]
    np.testing.assert_allclose(left, [2 / 6, 0, 0, 0])
    np.testing.assert_allclose(right, [2 / 6, 0, 0, 0])
    assert list(trace.saturation()) == ["i", "f", "o"]
    assert trace.saturation()["o"].left.shape == (4,)


def test_saturation_counts_no_masked_step(trace):
    trace.i[:] = 0.95
    trace.i[1, 2] = np.nan
    mask = np.array([[True] * 3, [True, True, False]])
    masked = GateTrace(**{name: getattr(trace, name) for name in ARRAYS}, mask=mask)
    np.testing.assert_array_equal(masked.saturation()["i"].right, 1)
    mask[:] = False
    assert np.isnan(masked.saturation()["i"].right).all()


def test_a_row_for_each_number(trace):
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = trace.to_dataframe(tokens=["abc", ["x", "", "<unk>"]])
    assert list(frame) == ["sample", "step", "token", "unit", "gate", "value"]
    assert len(frame) == 2 * 3 * 4 * 6
    for name in ARRAYS:
        one = frame[frame.gate == name].set_index(["sample", "step", "unit"]).value
        values = getattr(trace, name)
        assert all(one[index] == values[index] for index in np.ndindex(values.shape))
    tokens = frame.drop_duplicates(["sample", "step"]).token.tolist()
    assert tokens == ["a", "b", "c", "x", "", "<unk>"]
    bare = trace.to_dataframe()
    assert bare.token.isna().all()
    pd.testing.assert_frame_equal(
        bare.drop(columns="token"), frame.drop(columns="token")
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["abc"], "`tokens` has 1 samples; expected 2, each with its 3 tokens"),
        (["abc", "ab"], "`tokens` has 2 tokens; expected 3, one for each step"),
        (["abc", 3], "`tokens` is 3; expected a string or a list of 3 strings"),
    ],
    ids=str,
)
def test_wrong_tokens(tokens, message, trace):
    pytest.importorskip("pandas", reason="pandas is not installed")
    with pytest.raises(ValueError, match=message):
        trace.to_dataframe(tokens)


def test_without_pandas_it_is_said(trace, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="`to_dataframe` needs pandas: run `pip inst"):
        trace.to_dataframe()


def test_repr_is_short(trace):
    assert repr(trace) == "GateTrace(layer='lstm', batch=2, time=3, units=4)"
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    more = GateTrace(**arrays, mask=np.ones((2, 3), bool), backward=trace)
    expected = "GateTrace(layer='', batch=2, time=3, units=4, masked, backward=…)"
    assert repr(more) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_trace_is_the_same_when_loaded(dtype, trace, tmp_path):
    arrays = {name: getattr(trace, name).astype(dtype) for name in ARRAYS}
    mask = np.array([[True, False, True]] * 2)
    saved = GateTrace(**arrays, mask=mask, layer="fôrward", backward=trace)
    path = tmp_path / "trace.npz"
    path.write_bytes(b"what was there before")
    saved.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["trace.npz"]
    loaded = GateTrace.load(path)
    for one, other in ((saved, loaded), (saved.backward, loaded.backward)):
        for name in (*ARRAYS, "mask"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.layer == other.layer
        assert one.i.dtype == other.i.dtype
    assert loaded.backward.backward is None


def test_a_file_is_for_those_whom_any_new_file_is_for(trace, tmp_path, monkeypatch):
    path, plain = tmp_path / "trace.npz", tmp_path / "plain"
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            # It is that of all threads, so it is left alone even for a moment.
            patch.setattr(os, "umask", None)
            trace.save(path)
        plain.touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_file_is_written_whole_or_not_at_all(trace, tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    trace.save(path)
    before = path.read_bytes()

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(trace_file.np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        trace.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        GateTrace.load(tmp_path / "none.npz")


def broken_files(trace, folder, rng):
    path = folder / "whole.npz"
    trace.save(path)
    whole = path.read_bytes()
    arrays = {"format": np.array(trace_file._FORMAT), **trace._to_arrays("")}
    yield "empty", b""
    yield "text", b"no trace at all"
    for length in rng.integers(1, len(whole), 5):
        yield f"cut at {length}", whole[:length]

    def changed(**changes):
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return path.read_bytes()

    yield "other format", changed(format=np.array("other"))
    yield "no format", changed(format=None)
    yield "no gate", changed(f=None)
    yield "no layer", changed(layer=None)
    yield "other shape", changed(f=trace.f[:, :2])
    yield "two axes", changed(**dict.fromkeys(ARRAYS, trace.f[0]))
    yield "integers", changed(f=trace.f.astype(int))
    yield "strings", changed(f=trace.f.astype(str))
    yield "odd mask", changed(mask=np.ones((2, 2), bool))
    yield "half of a backward trace", changed(backward_i=trace.i)
    yield "pickle", changed(f=np.array([print], dtype=object))
    np.save(path.with_suffix(".npy"), trace.f)
    yield "one array", path.with_suffix(".npy").read_bytes()


def load_or_error(path):
    try:
        return GateTrace.load(path), ""
    except ValueError as error:
        return None, str(error)


def test_damaged_and_foreign_files_are_refused(trace, tmp_path, rng):
    path = tmp_path / "broken.npz"
    for what, content in list(broken_files(trace, tmp_path, rng)):
        path.write_bytes(content)
        loaded, error = load_or_error(path)
        assert loaded is None, what
        assert re.fullmatch(rf"`path` is '{path}', which is damaged or .*\.", error), (
            what
        )


def test_flipped_bytes_are_noticed(trace, tmp_path, rng):
    path = tmp_path / "trace.npz"
    trace.save(path)
    whole = path.read_bytes()
    for position in rng.integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        loaded, error = load_or_error(path)
        if loaded is None:
            assert error.startswith("`path` is ")
        else:  # a byte that means nothing, such as one of a date
            np.testing.assert_array_equal(loaded.c, trace.c)


def test_a_packed_bomb_is_not_unpacked(trace, tmp_path):
    path = tmp_path / "bomb.npz"
    arrays = trace._to_arrays("") | {"f": np.zeros((2, 3, 10**6), "float32")}
    np.savez_compressed(path, format=np.array(trace_file._FORMAT), **arrays)
    assert path.stat().st_size < 10**6
    loaded, error = load_or_error(path)
    assert loaded is None
    assert "damaged or no gate trace" in error
