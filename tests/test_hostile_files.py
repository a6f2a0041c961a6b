"""Files from strangers run no code, and take no more memory than they should.

Each payload would make the file `canary`. (What Keras itself reads, it reads as a
whole: that a model file's own JSON is short is for whoever accepts the file to see.)
"""

import base64
import contextlib
import io
import json
import marshal
import os
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from keras_scratch_lstm import GateTrace, ScratchLSTM, ScratchLSTMCell
from keras_scratch_lstm.tracing.trace import ARRAYS

KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
MB = 2**20


@pytest.fixture
def canary(tmp_path):
    """What no payload has made by the end of the test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def make_model(units=4):
    return keras.Sequential(
        [
            keras.Input((5, 3)),
            ScratchLSTM(units, return_sequences=True, name="layer"),
            layers.RNN(ScratchLSTMCell(units), name="rnn"),
        ]
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.keras"
    make_model().save(path)
    return path


def rewrite(path, change):
    """A model file with its configuration changed."""
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    config = json.loads(content["config.json"])
    change(config)
    content["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as file:
        for name, value in content.items():
            file.writestr(name, value)


def config_of(config, name):
    """The configuration of one layer of a Sequential model, as it is serialized."""
    (found,) = (
        layer
        for layer in config["config"]["layers"]
        if layer["config"].get("name") == name
    )
    return found


# --- model files -------------------------------------------------------------


def a_function(module, name):
    return {
        "module": module,
        "class_name": "function",
        "config": name,
        "registered_name": name,
    }


def a_class(module, name, config):
    return {
        "module": module,
        "class_name": name,
        "config": config,
        "registered_name": name,
    }


def a_lambda(canary):
    code = compile(f"open({str(canary)!r}, 'w')", "payload", "eval")
    payload = marshal.dumps(code)
    value = {
        "code": base64.b64encode(payload).decode(),
        "defaults": None,
        "closure": None,
    }
    return {"class_name": "__lambda__", "config": {"value": value, **value}}


PAYLOADS = {
    "a lambda": a_lambda,
    "a function of another package": lambda canary: a_function("os", "system"),
    "a class of another package": lambda canary: a_class(
        "subprocess", "Popen", {"args": ["touch", str(canary)]}
    ),
    "a module of the folder": lambda canary: a_class("payload_module", "Payload", {}),
    "a utility of Keras": lambda canary: a_class(
        "keras.utils",
        "get_file",
        {"fname": str(canary), "origin": f"file://{__file__}"},
    ),
}
PLACES = {
    "activation": lambda config: (config_of(config, "layer")["config"], "activation"),
    "initializer": lambda config: (
        config_of(config, "layer")["config"],
        "kernel_initializer",
    ),
    "initializer of a gate": lambda config: (
        config_of(config, "layer")["config"].setdefault("bias_initializer", {}),
        "f",
    ),
    "constraint": lambda config: (
        config_of(config, "rnn")["config"]["cell"]["config"],
        "bias_constraint",
    ),
    "regularizer": lambda config: (
        config_of(config, "layer")["config"],
        "activity_regularizer",
    ),
    "dtype": lambda config: (config_of(config, "layer")["config"], "dtype"),
    "cell": lambda config: (config_of(config, "rnn")["config"], "cell"),
    "own cell": lambda config: (config_of(config, "layer")["config"], "cell"),
}


@pytest.mark.skipif(KERAS < (3, 13), reason="Keras imported what a file named")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_model_file_with_a_payload(
    place, payload, saved, canary, tmp_path, monkeypatch
):
    (tmp_path / "payload_module.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)

    def change(config):
        if place == "initializer of a gate":
            config_of(config, "layer")["config"]["bias_initializer"] = {}
        within, key = PLACES[place](config)
        within[key] = PAYLOADS[payload](canary)

    rewrite(saved, change)
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(saved)
    assert "payload_module" not in sys.modules


def test_model_files_cut_short(saved, canary, rng):
    whole = saved.read_bytes()
    for length in rng.integers(0, len(whole), 20):
        saved.write_bytes(whole[:length])
        with pytest.raises((ValueError, OSError, KeyError, zipfile.BadZipFile)):
            keras.saving.load_model(saved)


# --- weights -----------------------------------------------------------------


@contextlib.contextmanager
def at_most(size):
    """What the process grows by on the way, in bytes."""

    def resident(key):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    except OSError as error:
        pytest.skip(f"the peak of memory can't be measured here: {error}")
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < size


def datasets(file):
    found = []
    file.visititems(
        lambda _, one: found.append(one) if isinstance(one, h5py.Dataset) else None
    )
    return [one for one in found if "W_" in str(one.attrs.get("name")) or one.ndim == 2]


def replace(dataset, **arguments):
    parent, name = dataset.parent, dataset.name
    del parent[name]
    parent.create_dataset(name, **arguments)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("transposed", {"data": np.zeros((4, 3), "float32")}),
        ("a scalar", {"data": np.float32(0)}),
        ("empty", {"shape": (0, 4), "dtype": "float32"}),
        ("text", {"data": np.array([[b"a"] * 4] * 3)}),
        # A few bytes that say they are 4 TB, which Keras sees.
        ("a bomb", {"shape": (10**6, 10**6), "dtype": "float32", "chunks": (1, 1)}),
    ],
)
def test_weights_that_do_not_fit(what, arguments, tmp_path):
    path = tmp_path / "model.weights.h5"
    model = make_model()
    model.save_weights(path)
    before = [np.array(weight) for weight in model.layers[0].cell.get_weights()]
    with h5py.File(path, "r+") as file:
        first = [
            one
            for one in datasets(file)
            if one.name.endswith("/0") and "layer" in one.name
        ]
        replace(first[0], **arguments)
    with at_most(100 * MB), pytest.raises((ValueError, TypeError)):
        model.load_weights(path)
    for one, other in zip(model.layers[0].cell.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_are_read_one_at_a_time(tmp_path):
    """Keras reads each up to 4 GB, but here no more than a layer's first."""
    path = tmp_path / "model.weights.h5"
    model = make_model()
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        for one in datasets(file):
            replace(one, shape=(16, MB), dtype="float32", compression="gzip")
    # Two layers with twelve arrays of 64 MB each.
    with at_most(6 * 64 * MB), pytest.raises(ValueError, match="W_xi of shape"):
        model.load_weights(path)


def test_weights_of_a_wider_layer_are_refused_by_name(tmp_path):
    path = tmp_path / "model.weights.h5"
    make_model(units=5).save_weights(path)
    with pytest.raises(ValueError, match=r"got `weights` with W_xi of shape \(3, 5\)"):
        make_model().load_weights(path)


def test_weights_cut_short(tmp_path, rng):
    path = tmp_path / "model.weights.h5"
    model = make_model()
    model.save_weights(path)
    whole = path.read_bytes()
    for length in rng.integers(0, len(whole) - 1, 20):
        path.write_bytes(whole[:length])
        with pytest.raises((ValueError, OSError, KeyError, RuntimeError)):
            model.load_weights(path)


# --- traces ------------------------------------------------------------------

F = np.full((2, 3, 4), 0.5, "float32")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def npy(array, pickled=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def header(shape, dtype="<f4"):
    """An array's header that says more than comes."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text))
    return start + text.encode()


def members():
    trace = GateTrace(**dict.fromkeys(ARRAYS, F))
    file = io.BytesIO()
    np.savez(file, format="keras_scratch_lstm.GateTrace 1", **trace._to_arrays(""))
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in content.items():
            file.writestr(name, value)


# What is beside the trace, and is not looked at.
HARMLESS = "pickle as more.npy", "thousands of empty members"


def hostile_traces(path, canary):
    """Writes one hostile trace after the other to `path`."""
    payload = Payload(canary)
    object_array = npy(np.array([payload], dtype=object), pickled=True)
    for name in ("f.npy", "format.npy", "layer.npy", "mask.npy", "more.npy"):
        archive(path, members() | {name: object_array})
        yield f"object array as {name}"
        archive(path, members() | {name: pickle.dumps(payload)})
        yield f"pickle as {name}"
    path.write_bytes(pickle.dumps(payload))
    yield "pickle"
    path.write_bytes(object_array)
    yield "one object array"
    path.write_bytes(header("(10**12,)".replace("10**12", str(10**12))))
    yield "one array that says it is 4 TB"
    path.write_bytes(header(f"({2**28},)") + bytes(64))
    yield "one array that says it is 1 GB"
    for shape in (f"({10**12}, 3, 4)", f"({2**28}, 1, 1)", "(2, 3, -4)", "(2,) * 9**9"):
        archive(path, members() | {"f.npy": header(shape) + bytes(96)})
        yield f"array of shape {shape}"
    archive(path, members() | {"f.npy": header("(2, 3, 4)", "|O") + bytes(96)})
    yield "objects"
    archive(path, members() | {"layer.npy": header("()", f"<U{2**28}")})
    yield "a name of 1 GB"
    archive(path, members() | {"f.npy": b"\x93NUMPY\x02\x00" + b"\xff" * 100})
    yield "a header of 4 GB"
    code = "__import__('os').mkdir('x')"
    archive(path, members() | {"f.npy": header(code) + bytes(96)})
    yield "code for a shape"
    bomb = npy(np.zeros((1, 2**24, 1), "float32"))
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        archive(path, members() | {"f.npy": bomb}, compression)
        yield f"zip bomb {compression}"
    archive(path, members(), zipfile.ZIP_LZMA)
    yield "LZMA, whose dictionary may be 4 GB"
    archive(path, members() | {f"{k}/f.npy": b"" for k in range(2000)})
    yield "thousands of empty members"


def test_a_hostile_trace(tmp_path, canary):
    path = tmp_path / "trace.npz"
    seen = 0
    for what in hostile_traces(path, canary):
        message = None
        with at_most(16 * MB + 10 * os.path.getsize(path)):
            try:
                GateTrace.load(path)
            except ValueError as error:
                message = str(error)
        if what not in HARMLESS:
            start = f"`path` is '{path}', which is damaged or no gate trace"
            assert (message or "").startswith(start), what
        seen += 1
    assert seen >= 25
    assert not canary.exists()
    assert not (tmp_path / "x").exists()


def test_a_member_that_hides_its_size(tmp_path):
    """The directory says 224 bytes, the data is packed, and unpacks to 64 MB."""
    path = tmp_path / "trace.npz"
    content = members() | {"f.npy": npy(np.zeros((1, 2**24, 1), "float32"))}
    archive(path, content, zipfile.ZIP_DEFLATED)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        sizes = {info.file_size for info in file.infolist()}
    for size in sizes:
        whole = whole.replace(struct.pack("<L", size), struct.pack("<L", 224))
    whole = whole.replace(
        struct.pack("<HH", 20, 0) + struct.pack("<H", zipfile.ZIP_DEFLATED),
        struct.pack("<HH", 20, 0) + struct.pack("<H", zipfile.ZIP_STORED),
    )
    path.write_bytes(whole)
    with at_most(32 * MB), pytest.raises(ValueError, match="no gate trace"):
        GateTrace.load(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe'; expected a file\.$"):
        GateTrace.load(tmp_path / "pipe")
