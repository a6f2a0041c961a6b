"""Hostile and random inputs: a result, or an error that names an argument.

Files from untrusted sources run no code, and allocate no more than they hold.
`HYPOTHESIS_PROFILE=long` draws 10,000 new random cases per test.
"""

import base64
import contextlib
import functools
import io
import json
import marshal
import os
import pickle
import re
import struct
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_scratch_lstm import (
    GateMonitor,
    GateTrace,
    ScratchLSTM,
    from_torch,
    to_builtin,
    to_scratch,
    to_torch,
    trace_gates,
)
from keras_scratch_lstm.tracing.trace import ARRAYS

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "quick")
MB = 2**20
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])


fuzz = settings(
    max_examples={"quick": 20, "full": 50, "deep": 100, "long": 10_000}[PROFILE],
    deadline=None,
    derandomize=PROFILE in ("quick", "full"),
    database=None,
    print_blob=True,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=list(HealthCheck),
)


# --- random arguments --------------------------------------------------------

NUMBERS = (
    st.integers(-3, 9)
    | st.sampled_from([2**31, 2**63, -(2**70), 0.5, -0.0, 1e300])
    | st.floats()
)
ARRAY = hnp.arrays(
    st.sampled_from(["float32", "float64", "int32", "bool", "complex64", "U2", "O"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
OBJECTS = [1j, int, object, print, len, ..., slice(1), range(3), set()]
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(OBJECTS)
SCALARS |= st.text(max_size=4) | st.binary(max_size=4)
KEY = st.sampled_from(["i", "class_name", "config", "x"])
NESTED = st.lists(SCALARS, max_size=3) | st.dictionaries(KEY, SCALARS, max_size=3)
ANYTHING = SCALARS | ARRAY | NESTED


def every(**strategies):
    return st.fixed_dictionaries(strategies)


def outcome(call, *names):
    """Return the result, or None after an error that names one of the arguments."""
    try:
        return call()
    except (FileNotFoundError, TypeError, ValueError) as error:
        raised = error
    assert not isinstance(raised, UnicodeError), raised
    assert not names or any(name in str(raised) for name in names), raised
    return None


F = np.full((2, 3, 4), 0.5, "float32")
TRACE = GateTrace(**dict.fromkeys(ARRAYS, F))
X = np.ones((2, 5, 3), "float32")
LSTM = ScratchLSTM(4, name="one")
LSTM(X)
STATE_DICT = st.fixed_dictionaries(
    {
        "weight_ih_l0": st.just(np.ones((16, 3))) | ANYTHING,
        "weight_hh_l0": st.just(np.ones((16, 4))) | ANYTHING,
    },
    optional=dict.fromkeys(["bias_ih_l0", "bias_hh_l0"], ANYTHING),
)
PATH = st.none() | NUMBERS | st.just("report.html") | st.binary(max_size=4)
TOKENS = st.just("abc") | st.lists(st.text(max_size=3), max_size=4) | ANYTHING
SAMPLE = st.integers(-1, 2) | ANYTHING
CALLS = {
    GateMonitor: every(probe=ANYTHING),
    GateTrace: st.fixed_dictionaries(
        dict.fromkeys(ARRAYS, st.just(F) | ANYTHING),
        optional=dict.fromkeys(["mask", "layer", "backward"], ANYTHING),
    ),
    trace_gates: st.fixed_dictionaries(
        {"model": st.just(LSTM) | SCALARS, "inputs": st.just(X) | ANYTHING},
        optional={"layer": ANYTHING, "batch_size": ANYTHING},
    ),
    to_scratch: every(model=ANYTHING),
    to_builtin: every(model=ANYTHING),
    to_torch: every(layer=ANYTHING),
    from_torch: every(lstm_or_state_dict=ANYTHING | STATE_DICT),
    TRACE.to_html: st.fixed_dictionaries(
        {"path": PATH, "tokens": TOKENS, "sample": SAMPLE},
        optional=dict.fromkeys(
            ["inputs", "feature_names", "times", "scores"], ANYTHING
        ),
    ),
    TRACE.save: every(path=PATH),
}
if find_spec("pandas"):
    CALLS[TRACE.to_dataframe] = every(tokens=TOKENS)
if find_spec("matplotlib"):
    from keras_scratch_lstm import plotting

    FOR_PLOT = {"tokens": TOKENS, "sample": SAMPLE, "steps": ANYTHING}
    FOR_PLOT["path"] = st.none() | NUMBERS | st.binary(max_size=4)
    ARRAY_NAME = st.sampled_from(ARRAYS) | ANYTHING
    CALLS |= {
        plotting.plot_gates: every(units=SAMPLE, **FOR_PLOT),
        plotting.plot_heatmap: every(array=ARRAY_NAME, ax=ANYTHING, **FOR_PLOT),
        plotting.plot_text: every(unit=SAMPLE, array=ARRAY_NAME, **FOR_PLOT),
    }
# What else an error may name.
OTHER_NAMES = {
    trace_gates: ["Input 0", "Inputs to a layer", "positional", "Cannot load"],
    from_torch: ["`weight_", "`bias_"],
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_random_arguments(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    is_plot = function.__name__.startswith("plot_")
    call = functools.partial(function, TRACE) if is_plot else function

    @fuzz
    @given(CALLS[function])
    def check(given):
        names = [f"`{name}" for name in given] + OTHER_NAMES.get(function, [])
        outcome(lambda: call(**given), *names)

    check()


# --- hostile model files -----------------------------------------------------


@pytest.fixture
def canary(tmp_path):
    """A file that every payload would create."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def make_model():
    lstm = ScratchLSTM(4, return_sequences=True, name="layer")
    return keras.Sequential([keras.Input((5, 3)), lstm])


def instance(module, name, config):
    return {
        "module": module,
        "class_name": name,
        "config": config,
        "registered_name": name,
    }


def payload_lambda(canary):
    code = marshal.dumps(compile(f"open({canary!r}, 'w')", "payload", "eval"))
    value = {"code": base64.b64encode(code).decode(), "defaults": None, "closure": None}
    return {"class_name": "__lambda__", "config": {"value": value, **value}}


PAYLOADS = {
    "lambda": payload_lambda,
    "class": lambda canary: instance(
        "subprocess", "Popen", {"args": ["touch", canary]}
    ),
    "module": lambda canary: instance("payload_module", "Payload", {}),
    "Keras utility": lambda canary: instance(
        "keras.utils", "get_file", {"fname": canary, "origin": f"file://{__file__}"}
    ),
}
PLACES = [
    ("layer", "activation"),
    ("layer", "bias_initializer", "f"),
    ("layer", "cell"),
]


@pytest.mark.skipif(KERAS < (3, 13), reason="Keras imports the modules a file names")
@pytest.mark.parametrize("place", PLACES, ids="/".join)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_in_model_file(place, payload, canary, tmp_path, monkeypatch):
    (tmp_path / "payload_module.py").write_text(f"open({str(canary)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "model.keras"
    make_model().save(path)
    content = read_archive(path)
    config = json.loads(content["config.json"])
    name, *keys, last = place
    (within,) = (
        layer["config"]
        for layer in config["config"]["layers"]
        if layer["config"].get("name") == name
    )
    for key in keys:
        within[key] = {}
        within = within[key]
    within[last] = PAYLOADS[payload](str(canary))
    write_archive(path, content | {"config.json": json.dumps(config)})
    with pytest.raises((AttributeError, TypeError, ValueError)):
        keras.saving.load_model(path)
    assert "payload_module" not in sys.modules


def read_archive(path):
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_archive(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, value in content.items():
            file.writestr(name, value)


@contextlib.contextmanager
def memory_below(size):
    """Check by how many bytes the process grows at its peak."""

    def resident(key):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError as error:
        pytest.skip(f"the peak of memory is not available: {error}")
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < size


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": np.zeros((4, 3), "float32")},  # transposed
        {"data": np.array([[b"a"] * 4] * 3)},
        # A few bytes that declare 4 TB.
        {"shape": (10**6, 10**6), "dtype": "float32", "chunks": (1, 1)},
    ],
    ids=["transposed", "text", "bomb"],
)
def test_invalid_weights(arguments, tmp_path):
    path, model = tmp_path / "model.weights.h5", make_model()
    model.save_weights(path)
    before = model.layers[0].get_weights()
    with h5py.File(path, "r+") as file:
        names = []
        file.visit(names.append)
        name = next(name for name in names if re.search("layer.*/0$", name))
        del file[name]
        file.create_dataset(name, **arguments)
    with memory_below(100 * MB), pytest.raises((ValueError, TypeError)):
        model.load_weights(path)
    for weight, old in zip(model.layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


# --- hostile trace files -----------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def header(shape, dtype="<f4"):
    """Return the header of an array, which may declare more than follows."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def hostile_files(members, canary):
    """Yield names, and the content of files that are no trace."""
    pickled, file = pickle.dumps(Payload(canary)), io.BytesIO()
    np.save(file, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    for name in ("f.npy", "format.npy", "layer.npy", "mask.npy"):
        yield f"object array as {name}", members | {name: file.getvalue()}
        yield f"pickle as {name}", members | {name: pickled}
    yield "pickle", pickled
    yield "object array", file.getvalue()
    yield "array of 4 TB", header(f"({10**12},)")
    yield "text", b"no trace"
    code = "__import__('os').mkdir('x')"
    shapes = f"({10**12}, 3, 4)", f"({2**28}, 1, 1)", "(2, 3, -4)", "(2,) * 9**9", code
    for shape in shapes:
        yield f"shape {shape}", members | {"f.npy": header(shape) + bytes(96)}
    yield "objects", members | {"f.npy": header("(2, 3, 4)", "|O") + bytes(96)}
    yield "name of 1 GB", members | {"layer.npy": header("()", f"<U{2**28}")}
    yield "header of 4 GB", members | {"f.npy": b"\x93NUMPY\x02\x00" + b"\xff" * 100}
    for name in ("format", "layer", "f"):
        without = {key: v for key, v in members.items() if key != f"{name}.npy"}
        yield f"no {name}", without
        yield (
            f"integer as {name}",
            without | {f"{name}.npy": header("()", "<i4") + b"0" * 4},
        )
    yield "half of a backward trace", members | {"backward_i.npy": members["i.npy"]}


def test_hostile_trace_files(tmp_path, canary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "trace.npz"
    TRACE.save(path)
    members = read_archive(path)

    def check(what, limit=16 * MB):
        limit += 10 * os.path.getsize(path)
        error = pytest.raises(ValueError, match="`path`")
        with memory_below(limit), error as raised:
            GateTrace.load(path)
        assert len(str(raised.value)) < 400, what

    for what, content in hostile_files(members, canary):
        if isinstance(content, dict):
            write_archive(path, content)
        else:
            path.write_bytes(content)
        check(what)
    bomb = members | {"f.npy": header(f"(1, {2**24}, 1)") + bytes(2**26)}
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        write_archive(path, bomb, compression)
        check(f"bomb {compression}")
    # Its dictionary may be 4 GB. The empty members make the file larger than its data.
    more = {f"{k}/f.npy": b"" for k in range(2000)}
    write_archive(path, members | more, zipfile.ZIP_LZMA)
    check("LZMA")
    # A directory that declares 224 stored bytes, of data that inflate to 64 MB.
    write_archive(path, bomb, zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        sizes = {info.file_size for info in file.infolist()}
    for size in sizes:
        whole = whole.replace(struct.pack("<L", size), struct.pack("<L", 224))
    deflated, stored = (struct.pack("<HHH", 20, 0, kind) for kind in (8, 0))
    path.write_bytes(whole.replace(deflated, stored))
    check("hidden size", 32 * MB)
    assert not (tmp_path / "x").exists()
    # Members that are not arrays are not read.
    write_archive(path, members | more | {"more.npy": pickle.dumps(Payload(canary))})
    np.testing.assert_array_equal(GateTrace.load(path).f, F)


@fuzz
@given(data=st.data())
def test_randomly_damaged_trace_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    TRACE.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        if data.draw(st.booleans()) and start < len(content):
            content[start] ^= 1 << data.draw(st.integers(0, 7))
            continue
        size = data.draw(st.integers(0, 400))
        new = data.draw(st.binary(max_size=8) | st.just(content[start : start + 100]))
        content[start : start + size] = new
    path.write_bytes(content)
    trace = outcome(lambda: GateTrace.load(path), "`path`")
    if trace is not None:  # only bytes without effect, such as of a date, are changed
        np.testing.assert_array_equal(trace.c, F)
