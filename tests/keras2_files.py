"""Write files as Keras 2.1 did."""

import json

import h5py
import numpy as np

# From Keras 2.1.6, which stores a Sequential model as a list.
KERAS_2_1 = {
    "class_name": "Sequential",
    "config": [
        {
            "class_name": "LSTM",
            "config": {
                "name": "lstm_1",
                "trainable": True,
                "batch_input_shape": [None, 5, 3],
                "dtype": "float32",
                "return_sequences": False,
                "return_state": False,
                "go_backwards": False,
                "stateful": False,
                "unroll": False,
                "units": 4,
                "activation": "tanh",
                "recurrent_activation": "sigmoid",
                "use_bias": True,
                "kernel_initializer": {
                    "class_name": "VarianceScaling",
                    "config": {
                        "scale": 1.0,
                        "mode": "fan_avg",
                        "distribution": "normal",
                        "seed": None,
                    },
                },
                "recurrent_initializer": {
                    "class_name": "Orthogonal",
                    "config": {"gain": 1.0, "seed": None},
                },
                "bias_initializer": {"class_name": "Zeros", "config": {}},
                "unit_forget_bias": True,
                "kernel_regularizer": {
                    "class_name": "L1L2",
                    "config": {"l1": 0.0, "l2": {"type": "ndarray", "value": 0.01}},
                },
                "recurrent_regularizer": None,
                "bias_regularizer": None,
                "activity_regularizer": None,
                "kernel_constraint": None,
                "recurrent_constraint": None,
                "bias_constraint": None,
                "dropout": 0.0,
                "recurrent_dropout": 0.0,
                "implementation": 1,
            },
        },
        {
            "class_name": "Dense",
            "config": {
                "name": "dense_1",
                "trainable": True,
                "units": 2,
                "activation": "hard_sigmoid",
                "use_bias": True,
            },
        },
    ],
}
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
