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
CONFIGURATIONS = {
    "not a model": ("architecture is not", "text"),
    "no layers": ("contents are invalid", serialized("Sequential")),
    "subclass": ("class of its model must be among", serialized("MyModel")),
    "layer": ("not the configuration of a layer", serialized("Sequential", layers=[3])),
    "unknown": (
        r"layer 'last' \(Mine\): the class is not supported. Pass `custom_objects={'Min"
        r"e': ...}`, or use only LSTM, GRU",
        changed(add("Mine")),
    ),
    "function": (
        r"layer 'd' \(TFOpLambda\): the function is not supported. Use only __operators"
        r"__.getitem, .*. Received: 'os.system'",
        operation(["x", 0, 0, {}], "os.system"),
    ),
    "no argument": ("'d' cannot be called", operation(["x", 0, 0, {}])),
    "unknown argument": (
        "'d' cannot be called: `z` is not supported. Received: z=2",
        operation(["x", 0, 0, {"y": 1, "z": 2}]),
    ),
    "constants": ("no inputs", operation(["_CONSTANT_VALUE", -1, [1], {"y": [2.0]}])),
    "shape of a tensor": (
        "'d' cannot be called: `shape` is not supported",
        operation(["x", 0, 0, {"shape": [["x", 0, 0], 3]}], "reshape"),
    ),
    "index": ("the index 'a' is not supported", getitem([0, "a"])),
    "tensor index": ("`slice_spec` is not supported", getitem([0, ["x", 0, 0]])),
    "lambda": (
        r"code in files is not run. Pass its function: `custom_objects={'last': f",
        changed(add("Lambda", function=["4wEA", None, None], function_type="lambda")),
    ),
    "class from a module": ("not supported", changed(add("os.system"))),
    "activation from a module": ("not supported", changed(replace(activation=SYSTEM))),
    "activation name": ("not a Keras acti", changed(replace(activation="deserialize"))),
    "regularizer": ("not one of", changed(replace(bias_regularizer=SYSTEM))),
    "policy": ("must not be a dict", changed(replace(seed=SYSTEM))),
    "time_major": ("Keras 3 has no `time_major`", changed(replace(time_major=True))),
    "many units": (
        r"layer 'lstm_1': `kernel` must have shape \(3, 400000000\). Received: \(3, 16",
        changed(replace(units=10**8)),
    ),
    "units": (r"layer 'lstm_1' \(LSTM\): ", changed(replace(units=-1))),
    "shape": ("cannot|invalid", changed(replace(batch_input_shape=[None, "a"]))),
    "ragged": (
        "no ragged inputs",
        changed(
            lambda _, layers: layers.insert(
                0, serialized("InputLayer", batch_input_shape=[None, 3], ragged=True)
            )
        ),
    ),
    "cycle": ("inputs of layer 'd' do not exist", functional([[["d", 0, 0, {}]]])),
    "negative": ("does not exist", functional([[["x", 0, -1, {}]]])),
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
    "vocabulary": (
        [None, 5],
        [("Embedding", {"input_dim": WIDE, "output_dim": 3}, 1)],
    ),
    "normalization": ([None, WIDE], [("Normalization", {}, 3)]),
    "kernel": (
        [None, 10**6, 10**6, 1],
        [("Conv2D", {"filters": 1, "kernel_size": [10**6, 10**6]}, 2)],
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
def test_states_and_constants_of_any_size_are_not_allocated(tmp_path, rng):
    config = {"units": 1, "stateful": True}
    sized(tmp_path / "model.h5", rng, [WIDE, 5, 1], [("LSTM", config, 3)])
    with h5py.File(tmp_path / "model.h5", "a") as file:
        group = file["model_weights/LSTM"]
        for k, name in enumerate(list(group.attrs["weight_names"])):
            del group[name]
            group[name] = np.ones([(1, 4), (1, 4), (4,)][k])
    with pytest.raises(ValueError, match="its state must have at most 16777216"):
        load_keras2(tmp_path / "model.h5")
    config = {"mean": [0.5], "variance": [0.5], "axis": [-1]}
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


def kernel(create):
    """Edit that replaces a weight."""

    def edit(file):
        group = file["model_weights/dense_1/dense_1"]
        del group["kernel:0"]
        create(group)

    return edit


def set_to(value):
    return kernel(lambda group: group.update({"kernel:0": value}))


def external(group):
    group.create_dataset("kernel:0", (4, 2), "float32", external=[("other.bin", 0, 32)])


def virtual(group):
    layout = h5py.VirtualLayout((4, 2), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (4, 2))
    group.create_virtual_dataset("kernel:0", layout)


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
        (kernel(lambda group: None), "'dense_1/kernel:0' is missing"),
        (
            set_to(np.ones((4, 3))),
            r"'dense_1': `kernel` must have shape \(4, 2\). Received: \(4, 3\)",
        ),
        (set_to(np.full((4, 2), b"a")), "`kernel` must hold numbers"),
        (set_to(h5py.ExternalLink("other.h5", "secret")), "kernel:0' is missing"),
        (kernel(external), "is not stored in the file"),
        (kernel(virtual), "is not stored in the file"),
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


def write_archive(path, rng, edit=None, members=(), **options):
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
        "metadata.json": json.dumps({"keras_version": "2.15.0"}),
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


BOMB = bytes(2**28)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": remove_cell}, "'lstm_1' has weights that are missing"),
        ({"edit": add_layer}, r"no layer has the weights of \['gru'\] in the file"),
        ({"edit": add_variable}, "'dense_1' has 2 weights of its own. Received: 3"),
        ({"members": {"metadata.json": None}}, "no model: it has no 'config.json'"),
        ({"members": {"model.weights.h5": None}}, "has an architecture, but no weigh"),
        ({"members": {"model.weights.h5": b"HDF"}}, "contents are invalid"),
        ({"members": {"metadata.json": b"[]"}}, "contents are invalid"),
        ({"members": {"config.json": BOMB}}, "'config.json' must have at most"),
        ({"members": {"model.weights.h5": BOMB}}, "'model.weights.h5' must have at m"),
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
