"""Damaged and hostile files raise one error, and run nothing."""

import contextlib
import copy
import json
import re
import sys
import zipfile

import h5py
import numpy as np
import pytest
from keras import layers
from keras2_files import KERAS_2_1, serialized, write_keras_2_1

from keras_scratch_lstm import load_keras2

pytestmark = pytest.mark.one_backend


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
        r"layer 'lstm_1' \(LSTM\): it must have at least 10{16} weights",
        changed(replace(units=10**8)),
    ),
    "large vocabulary": (
        "'last' .Embedding.: it must have at least 6000000 weights, which is more",
        changed(add("Embedding", input_dim=2_000_000, output_dim=3)),
    ),
    "large kernel": (
        "'last' .Conv2D.: it must have at least 100000000 weights",
        changed(add("Conv2D", filters=1, kernel_size=[10_000, 10_000])),
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
    with pytest.raises(ValueError, match=r"neither HDF5 nor JSON. Save it as HDF5 in"):
        load_keras2(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"zip .*`keras.saving.load_model`"):
        load_keras2(path)
    with pytest.raises(ValueError, match=r"SavedModel. Save it as HDF5 .*save\('mod"):
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
