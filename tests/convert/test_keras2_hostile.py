"""Damaged and hostile files raise one error, and run nothing."""

import contextlib
import copy
import io
import json
import re
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras2_files import KERAS_2_1, serialized, write_keras_2_1

from keras_scratch_lstm import load_keras2

pytestmark = [pytest.mark.ci, pytest.mark.one_backend]


def changed(edit, config=KERAS_2_1):
    """A copy of a configuration, after `edit(config, layers)`."""
    config = copy.deepcopy(config)
    edit(config, config["config"])
    return config


def replace(**arguments):
    """Edit that changes arguments of the first layer."""
    return lambda config, layers: layers[0]["config"].update(arguments)


def add(class_name, **config):
    """Edit that appends a layer."""
    spec = serialized(class_name, name="last", **config)
    return lambda _, layers: layers.append(spec)


def functional(nodes, outputs=(["d", 0, 0],)):
    """A model of an input `x` and of a layer `d` that is called as `nodes` say."""
    tensor = serialized("InputLayer", name="x", batch_input_shape=[None, 3])
    dense = serialized("Dense", name="d", units=2)
    specs = [tensor | {"inbound_nodes": []}, dense | {"inbound_nodes": nodes}]
    ends = {"input_layers": [["x", 0, 0]], "output_layers": list(outputs)}
    return serialized("Functional", name="m", layers=specs, **ends)


def operation(node, function="math.add"):
    """A model of an input `x` and of an operation `d`."""
    config = functional([node])
    config["config"]["layers"][1] |= serialized("TFOpLambda", function=function)
    config["config"]["layers"][1]["config"]["name"] = "d"
    return config


def getitem(index):
    return operation(["x", 0, 0, {"slice_spec": index}], "__operators__.getitem")


INDEX = [{"start": None, "stop": -1, "step": 1}, 0]
SYSTEM = {"module": "os", "class_name": "system", "config": {"command": "touch ran"}}
CODE = {"class_name": "__lambda__", "config": {"value": "4wEAAA=="}}
CONFIGURATIONS = {
    "not a model": ("architecture is not", "text"),
    "no layers": ("contents are invalid", serialized("Sequential")),
    "empty": ("no layers", serialized("Sequential", layers=[])),
    "subclass": ("class of its model must be among", serialized("MyModel")),
    "layer": ("not the configuration of a layer", serialized("Sequential", layers=[3])),
    "unknown": (
        r"layer 'last' \(Mine\): the class is not supported. Pass `custom_objects={'Min"
        r"e': ...}`, or use only LSTM, GRU",
        changed(add("Mine")),
    ),
    "operation": (r"'last' \(TFOpLambda\)", changed(add("TFOpLambda", function="add"))),
    "function": (
        r"layer 'd' \(TFOpLambda\): the function is not supported. Use only __operators"
        r"__.getitem, .*. Received: 'os.system'",
        operation(["x", 0, 0, {}], "os.system"),
    ),
    "list of functions": ("function is not", operation(["x", 0, 0, {}], ["math.add"])),
    "no function": ("function is not supported", operation(["x", 0, 0, {}], None)),
    "no argument": ("'d' cannot be called", operation(["x", 0, 0, {}])),
    "unknown argument": (
        "'d' cannot be called: `z` is not supported. Received: z=2",
        operation(["x", 0, 0, {"y": 1, "z": 2}]),
    ),
    "text argument": ("'d' cannot be called", operation(["x", 0, 0, {"y": "a"}])),
    "ragged array": (
        "'d' cannot be called",
        operation(["x", 0, 0, {"y": [[1], [1, 2]]}]),
    ),
    "text node": ("'d' cannot be called", operation("x")),
    "number node": ("'d' cannot be called", operation(3)),
    "constants": ("no inputs", operation(["_CONSTANT_VALUE", -1, [1], {"y": [2.0]}])),
    "shape of a tensor": (
        "'d' cannot be called: `shape` is not supported",
        operation(["x", 0, 0, {"shape": [["x", 0, 0], 3]}], "reshape"),
    ),
    "index": ("the index 'a' is not supported", getitem([0, "a"])),
    "boolean index": ("the index True is not supported", getitem(True)),
    "slice": ("index {'start': 1} is not supported", getitem({"start": 1})),
    "slice step": (
        "the index .* is not supported",
        getitem({"start": None, "stop": None, "step": 0}),
    ),
    "tensor index": ("`slice_spec` is not supported", getitem([0, ["x", 0, 0]])),
    "many indices": ("'d' cannot be called", getitem([0, 0, 0])),
    "lambda": (
        r"code in files is not run. Pass its function: `custom_objects={'last': f",
        changed(add("Lambda", function=["4wEA", None, None], function_type="lambda")),
    ),
    "class from a module": ("not supported", changed(add("os.system"))),
    "activation from a module": ("not supported", changed(replace(activation=SYSTEM))),
    "activation code": ("not supported", changed(replace(activation=CODE))),
    "activation name": ("not a Keras acti", changed(replace(activation="deserialize"))),
    "dotted name": ("not a Keras acti", changed(replace(activation="os.system"))),
    "regularizer": ("not one of", changed(replace(bias_regularizer=SYSTEM))),
    "constraint": ("not one of", changed(replace(bias_constraint=SYSTEM))),
    "policy": ("must not be a dict", changed(replace(seed=SYSTEM))),
    "time_major": ("Keras 3 has no `time_major`", changed(replace(time_major=True))),
    "many units": (
        r"layer 'lstm_1': `kernel` must have shape \(3, 400000000\). Received: \(3, 16",
        changed(replace(units=10**8)),
    ),
    "units": (r"layer 'lstm_1' \(LSTM\): ", changed(replace(units=-1))),
    "units type": (r"layer 'lstm_1' \(LSTM\): ", changed(replace(units="many"))),
    "shape": ("cannot|invalid", changed(replace(batch_input_shape=[None, "a"]))),
    "ragged": (
        "no ragged inputs",
        changed(
            lambda _, layers: layers.insert(
                0, serialized("InputLayer", batch_input_shape=[None, 3], ragged=True)
            )
        ),
    ),
    "other layer": (
        "inputs of layer 'd' do not exist",
        functional([[["y", 0, 0, {}]]]),
    ),
    "cycle": ("inputs of layer 'd' do not exist", functional([[["d", 0, 0, {}]]])),
    "other call": ("do not exist|does not exist", functional([[["x", 5, 0, {}]]])),
    "other output": ("does not exist", functional([[["x", 0, 5, {}]]])),
    "negative": ("does not exist", functional([[["x", 0, -1, {}]]])),
    "not called": ("does not exist", functional([])),
    "argument": ("cannot be called", functional([[["x", 0, 0, {"training_": 1}]]])),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_invalid_configurations_raise_one_error(tmp_path, monkeypatch, rng, name):
    message, config = CONFIGURATIONS[name]
    monkeypatch.chdir(tmp_path)
    write_keras_2_1(tmp_path / "model.h5", rng, config)
    loaded = set(sys.modules)
    with pytest.raises(
        ValueError, match=f"^Cannot load .*model.h5': .*({message})"
    ) as error:
        load_keras2(tmp_path / "model.h5")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.h5"]
    assert set(sys.modules) - loaded <= {"os"}


# --- sizes: layers, the number of weights of each, and the error -------------

WIDE = 10**10
SIZES = {
    "units": ([None, 5, 3], [("LSTM", {"units": WIDE}, 3)]),
    "inputs of LSTM": ([None, 5, WIDE], [("LSTM", {"units": 1}, 3)]),
    "inputs of GRU": ([None, 5, WIDE], [("GRU", {"units": 1}, 3)]),
    "vocabulary": (
        [None, 5],
        [("Embedding", {"input_dim": WIDE, "output_dim": 3}, 1)],
    ),
    "batch normalization": ([None, WIDE], [("BatchNormalization", {}, 4)]),
    "layer normalization": ([None, WIDE], [("LayerNormalization", {}, 2)]),
    "normalization": ([None, WIDE], [("Normalization", {}, 3)]),
    "PReLU": ([None, WIDE], [("PReLU", {}, 1)]),
    "Conv1D": ([None, 5, WIDE], [("Conv1D", {"filters": 1, "kernel_size": 2}, 2)]),
    "kernel": (
        [None, 10**6, 10**6, 1],
        [("Conv2D", {"filters": 1, "kernel_size": [10**6, 10**6]}, 2)],
    ),
    "filters": (
        [None, 5, 8, 8, 1],
        [("ConvLSTM2D", {"filters": 9000, "kernel_size": 3}, 3)],
    ),
    "depth multiplier": (
        [None, 5, 3],
        [("DepthwiseConv1D", {"kernel_size": 2, "depth_multiplier": WIDE}, 2)],
    ),
    "repeated": (
        [None, 3],
        [
            ("RepeatVector", {"n": WIDE}, 0),
            ("Flatten", {}, 0),
            ("Dense", {"units": 2}, 2),
        ],
    ),
    "padded": (
        [None, 5, 3],
        [
            ("ZeroPadding1D", {"padding": WIDE}, 0),
            ("Flatten", {}, 0),
            ("Dense", {"units": 2}, 2),
        ],
    ),
    "wrapped": (
        [None, 5, WIDE],
        [("Bidirectional", {"layer": serialized("LSTM", name="l", units=1)}, 6)],
    ),
    "time distributed": (
        [None, 5, WIDE],
        [("TimeDistributed", {"layer": serialized("Dense", name="d", units=1)}, 2)],
    ),
    "cells": (
        [None, 5, 3],
        [("RNN", {"cell": serialized("LSTMCell", name="c", units=WIDE)}, 3)],
    ),
}


@pytest.fixture
def little_memory():
    """Half a GB, and what the process has already."""
    resource = pytest.importorskip("resource")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**29
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def sized(path, rng, shape, specs, weight_shape=(1,)):
    """Write a model of layers, each with some weights, all of one shape."""
    tensor = serialized("InputLayer", name="x", batch_input_shape=shape)
    config = [tensor, *(serialized(name, name=name, **c) for name, c, _ in specs)]
    shapes = {
        name: {f"weight_{k}": weight_shape for k in range(count)}
        for name, _, count in specs
        if count
    }
    write_keras_2_1(path, rng, serialized("Sequential", layers=config), shapes)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", SIZES)
def test_weights_of_other_shapes_are_not_allocated(tmp_path, rng, name):
    sized(tmp_path / "model.h5", rng, *SIZES[name])
    with pytest.raises(ValueError, match=r"must have shape .*0.*\. Received: \(1,\)"):
        load_keras2(tmp_path / "model.h5")
    # The variables are gone, and do not get values later.
    with keras.StatelessScope():
        keras.layers.Dense(2).build((None, 3))


@pytest.mark.usefixtures("little_memory")
def test_heads_of_other_shapes_are_not_allocated(tmp_path, rng):
    config = functional([[["x", 0, 0, {"value": ["x", 0, 0]}]]])
    tensor, spec = config["config"]["layers"]
    tensor["config"]["batch_input_shape"] = [None, 5, 3]
    spec |= serialized("MultiHeadAttention", name="d", num_heads=10**4, key_dim=10**5)
    weights = {"d": {f"weight_{k}": (1,) for k in range(8)}}
    write_keras_2_1(tmp_path / "model.h5", rng, config, weights)
    with pytest.raises(ValueError, match=r"`kernel` must have shape .3, 10000, 100000"):
        load_keras2(tmp_path / "model.h5")


@pytest.mark.usefixtures("little_memory")
def test_states_and_constants_of_any_size_are_not_allocated(tmp_path, rng):
    config = {"units": 1, "stateful": True}
    for spec in (
        ("LSTM", config, 3),
        ("Bidirectional", {"layer": serialized("LSTM", name="l", **config)}, 6),
    ):
        sized(tmp_path / "model.h5", rng, [WIDE, 5, 1], [spec])
        with h5py.File(tmp_path / "model.h5", "a") as file:
            for value in file["model_weights"].values():
                names = list(value.attrs["weight_names"])
                for k, name in enumerate(names):
                    del value[name]
                    value[name] = np.ones([(1, 4), (1, 4), (4,)][k % 3])
        with pytest.raises(ValueError, match="its state must have at most 16777216"):
            load_keras2(tmp_path / "model.h5")
    for mean in (0.5, [0.5]):
        config = {"mean": mean, "variance": mean, "axis": [-1]}
        layers = [("Normalization", config, 0), ("Dense", {"units": 1}, 2)]
        sized(tmp_path / "model.h5", rng, [None, WIDE], layers)
        with pytest.raises(ValueError, match=r"must have shape \(10000000000, 1\)"):
            load_keras2(tmp_path / "model.h5")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}])
def test_arrays_that_the_file_does_not_hold_are_not_allocated(tmp_path, rng, options):
    sized(tmp_path / "model.h5", rng, [None, 10**5], [("Dense", {"units": 10**5}, 2)])
    with h5py.File(tmp_path / "model.h5", "a") as file:
        group = file["model_weights/Dense/Dense"]
        for name, shape in {
            "weight_0:0": (10**5, 10**5),
            "weight_1:0": (10**5,),
        }.items():
            del group[name]
            group.create_dataset(name, shape, "float32", chunks=True, **options)
    with pytest.raises(ValueError, match="must not have more weights than bytes"):
        load_keras2(tmp_path / "model.h5")


# --- weights -----------------------------------------------------------------


def delete(file):
    del file["model_weights/dense_1/dense_1/kernel:0"]


def resize(file):
    delete(file)
    file["model_weights/dense_1/dense_1/kernel:0"] = np.ones((4, 3))


def huge(file):
    delete(file)
    group = file["model_weights/dense_1/dense_1"]
    group.create_dataset("kernel:0", (2**40, 2**10), "float32", chunks=(1024, 1024))


def text(file):
    delete(file)
    file["model_weights/dense_1/dense_1/kernel:0"] = np.full((4, 2), b"a")


def link(file):
    delete(file)
    target = h5py.ExternalLink("other.h5", "secret")
    file["model_weights/dense_1/dense_1/kernel:0"] = target


def external(file):
    delete(file)
    group = file["model_weights/dense_1/dense_1"]
    group.create_dataset("kernel:0", (4, 2), "float32", external=[("other.bin", 0, 32)])


def virtual(file):
    delete(file)
    layout = h5py.VirtualLayout((4, 2), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (4, 2))
    file["model_weights/dense_1/dense_1"].create_virtual_dataset("kernel:0", layout)


def swap(file):
    group = file["model_weights/lstm_1"]
    group.attrs["weight_names"] = group.attrs["weight_names"][[1, 0, 2]]


def remove_layer(file):
    del file["model_weights"].attrs["layer_names1"]


def remove_weight(file):
    group = file["model_weights/lstm_1"]
    group.attrs["weight_names"] = group.attrs["weight_names"][:2]


def outside(file):
    group = file["model_weights"].create_group("top_level_model_weights")
    group.attrs["weight_names"] = [b"weight"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (delete, "'dense_1/kernel:0' is missing"),
        (resize, r"'dense_1': `kernel` must have shape \(4, 2\). Received: \(4, 3\)"),
        (huge, "`kernel` must have shape"),
        (text, "`kernel` must hold numbers"),
        (link, "'dense_1/kernel:0' is missing"),
        (external, "is not stored in the file"),
        (virtual, "is not stored in the file"),
        (swap, "its weight `kernel` has the name 'lstm_1/recurrent_kernel:0'"),
        (remove_layer, "2 layers with weights. Received: 1 such"),
        (remove_weight, "'lstm_1' has 3 weights. Received: 2 for 'lstm_1'"),
        (outside, "weights outside its layers"),
        (lambda file: file.attrs.pop("model_config"), "no architecture"),
        (lambda file: file.attrs.update(model_config="{"), "not valid JSON"),
        (lambda file: file.attrs.update(model_config=9999 * "["), "are invalid"),
        (lambda file: file.attrs.update(model_config=3), "architecture is not"),
        (lambda file: file.attrs.update(keras_version="1.2.2"), "Keras 1 wrote it"),
        (lambda file: file.attrs.update(keras_version="3.4.0"), "saving.load_model"),
    ],
)
def test_invalid_weights_raise_one_error(tmp_path, rng, edit, message):
    path = tmp_path / "model.h5"
    write_keras_2_1(path, rng)
    with h5py.File(path, "a") as file:
        edit(file)
    with pytest.raises(ValueError, match=f"^Cannot load .*model.h5': .*{message}"):
        load_keras2(path)


def test_files_of_other_kinds_raise_one_error(tmp_path, rng):
    path = tmp_path / "model.h5"
    write_keras_2_1(path, rng)
    content = path.read_bytes()
    for kept in (len(content) // 2, 100, 9):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="Cannot load"):
            load_keras2(path)
    path.write_bytes(b"some text")
    with pytest.raises(ValueError, match=r"neither HDF5, nor a .* JSON. In an env"):
        load_keras2(path)
    for content, message in {
        b"": "an empty file",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "a Git LFS",
        b"\n<!DOCTYPE html><html></html>": "a web page",
        b"<html>": "a web page",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^Cannot load .*: it is {message}"):
            load_keras2(path)
    with pytest.raises(
        ValueError, match=r"SavedModel. In .*`pip install tf-keras`, th"
    ):
        load_keras2(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_keras2(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="`custom_objects` must be a dict or None"):
        load_keras2(path, [layers.LSTM])
    with pytest.raises(ValueError, match="`path` must be the path of a file"):
        load_keras2(3)


class OneError(Exception):
    pass


VALUES = (None, -1, 0, 2.5, True, "x", "", [], [[]], {}, [None], "LSTM", ["x", 0, 0])


def mutated(value, rng):
    """A copy of a JSON value with one random part replaced."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return VALUES[rng.integers(len(VALUES))]
    value = copy.copy(value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[rng.integers(len(keys))]
    value[key] = mutated(value[key], rng)
    return value


@pytest.mark.filterwarnings("ignore")
def test_mutated_configurations_load_or_raise_one_error(tmp_path, rng):
    path = tmp_path / "model.h5"
    functions = functional([[["x", 0, 0, {}]]])
    for k in range(150):
        start = (KERAS_2_1, functions, getitem(INDEX))[k % 3]
        config = mutated(start, rng)
        write_keras_2_1(path, rng, config)
        print(json.dumps(config))
        with contextlib.suppress(OneError):
            try:
                load_keras2(path)
            except ValueError as error:
                is_one = re.fullmatch("Cannot load '.*model.h5': .*", str(error))
                raise (OneError if is_one else AssertionError) from error


# --- archives ----------------------------------------------------------------


def write_archive(path, rng, edit=None, members=(), version="2.15.0", **options):
    """Write an archive as Keras 2.15 did, after `edit(file)` of its weights."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        shapes = {"lstm/cell": [(3, 16), (4, 16), (16,)], "dense": [(4, 2), (2,)]}
        for name, weights in shapes.items():
            for k, shape in enumerate(weights):
                file[f"layers/{name}/vars/{k}"] = rng.normal(size=shape)
        if edit:
            edit(file)
    content = {
        "metadata.json": json.dumps({"keras_version": version}),
        "config.json": json.dumps(serialized("Sequential", layers=KERAS_2_1["config"])),
        "model.weights.h5": buffer.getvalue(),
        **dict(members),
    }
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, value in content.items():
            if value is not None:
                archive.writestr(name, value)


def share(file):
    """Links in circles, and to one object by very many paths."""
    file["layers/lstm/layers"] = file["layers"]
    for k in range(40):
        file[f"level_{k}/a"] = file[f"level_{k - 1}" if k else "layers"]
        file[f"level_{k}/b"] = file[f"level_{k}/a"]


def test_archives_with_other_members_are_loaded(tmp_path, rng):
    path = tmp_path / "model.keras"
    members = {"../escaped": b"x", "assets/../../escaped": b"x", "/escaped": b"x"}
    write_archive(path, rng, share, members, compression=zipfile.ZIP_DEFLATED)
    assert load_keras2(path).count_params() == 3 * 16 + 4 * 16 + 16 + 4 * 2 + 2
    assert list(tmp_path.iterdir()) == [path]
    assert not (tmp_path.parent / "escaped").exists()


def remove_cell(file):
    del file["layers/lstm/cell"]


def add_layer(file):
    file["layers/gru/cell/vars/0"] = np.ones((2, 2))


def add_variable(file):
    file["layers/dense/vars/2"] = np.ones(2)


def widen(file):
    del file["layers/dense/vars/0"]
    file["layers/dense/vars/0"] = np.ones((4, 10**4))


BOMB = bytes(2**28)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": remove_cell}, "'lstm_1' has weights that are missing"),
        ({"edit": add_layer}, r"no layer has the weights of \['gru'\] in the file"),
        ({"edit": add_variable}, "'dense_1' has 2 weights of its own. Received: 3"),
        ({"edit": widen}, r"'dense_1': `kernel` must have shape \(4, 2\)"),
        ({"members": {"metadata.json": None}}, "no model: it has no 'config.json'"),
        ({"members": {"model.weights.h5": None}}, "has an architecture, but no weigh"),
        ({"members": {"model.weights.h5": b"HDF"}}, "contents are invalid"),
        ({"members": {"config.json": b"{"}}, "not valid JSON"),
        ({"members": {"metadata.json": b"[]"}}, "contents are invalid"),
        ({"members": {"config.json": BOMB}}, "'config.json' must have at most"),
        ({"members": {"model.weights.h5": BOMB}}, "'model.weights.h5' must have at m"),
        ({"members": {"a/vocabulary.txt": BOMB}}, "vocabulary.txt' must have at most"),
        ({"version": "3.4.0"}, "`keras.saving.load_model` for it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_archives_raise_one_error(tmp_path, rng, options, message):
    path = tmp_path / "model.keras"
    write_archive(path, rng, **options, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=f"^Cannot load .*model.keras': .*{message}"):
        load_keras2(path)


def test_paths_of_vocabularies_are_not_opened(tmp_path, rng):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret\nwords")
    for vocabulary in (str(secret), None):
        config = {"vocabulary": vocabulary, "max_tokens": None}
        edit = add("TextVectorization", **config)
        write_keras_2_1(tmp_path / "model.h5", rng, changed(edit))
        with pytest.raises(ValueError, match=r"'last' .*its vocabulary is not in the"):
            load_keras2(tmp_path / "model.h5")
