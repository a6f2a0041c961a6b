"""Files of Keras 2: those that `tf-keras` makes, and one as Keras 2.1 did."""

import copy
import json
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import ops
from reference import run_python

FOLDER = Path(__file__).parent / "convert"

# From Keras 2.1.6, which stores a Sequential model as a list.
KERAS_2_1 = json.loads((FOLDER / "keras_2_1.json").read_text())
# With the activation that Keras 3 would read as another function.
HARD = copy.deepcopy(KERAS_2_1)
HARD["config"][0]["config"]["recurrent_activation"] = "hard_sigmoid"
SHAPES = {
    "lstm_1": {"kernel": (3, 16), "recurrent_kernel": (4, 16), "bias": (16,)},
    "dense_1": {"kernel": (4, 2), "bias": (2,)},
}


def write_keras_2_1(path, rng, config=KERAS_2_1, shapes=SHAPES, version="2.1.6"):
    """Write a file as Keras 2.1 did, and return its weights."""
    values = {}
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = np.bytes_(json.dumps(config).encode())
        file.attrs["keras_version"] = np.bytes_(version.encode())
        file.attrs["backend"] = np.bytes_(b"tensorflow")
        root = file.create_group("model_weights")
        for k, name in enumerate(shapes):  # as if the list were too long
            root.attrs[f"layer_names{k}"] = np.array([name.encode()])
        for name, weights in shapes.items():
            group = root.create_group(name)
            names = [f"{name}/{weight}:0".encode() for weight in weights]
            group.attrs["weight_names"] = names
            for key, shape in zip(names, weights.values(), strict=True):
                group[key] = values[key] = rng.normal(size=shape).astype("float32")
    return list(values.values())


def serialized(class_name, **config):
    return {"class_name": class_name, "config": config}


def run_keras2(folder, *arguments):
    """Make the files of `tf-keras`: see the arguments of `make_keras2.py`."""
    run_python(FOLDER / "make_keras2.py", folder, *arguments)


def predict(model, inputs):
    inputs = inputs if len(inputs) > 1 else inputs[0]
    outputs = keras.tree.flatten(model(inputs))
    return [ops.convert_to_numpy(output) for output in outputs]


def recorded(files, name):
    arrays = np.load(files / f"{name}.npz")
    return [[arrays[key] for key in arrays if key[0] == kind] for kind in "xy"]


def assert_predicts_as_recorded(model, files, name):
    inputs, expected = recorded(files, name)
    for one, other in zip(predict(model, inputs), expected, strict=True):
        scale = np.ptp(other)
        assert scale > 1e-3, name
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=2e-5)
