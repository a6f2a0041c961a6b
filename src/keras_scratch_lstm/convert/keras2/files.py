"""Read the files of Keras 2: HDF5 models, HDF5 weights and JSON architectures."""

import contextlib
import json
from typing import Any, NamedTuple

import h5py
import numpy as np

_ZIP = b"PK\x03\x04"
_RESAVE = (
    "Save it as HDF5 in the environment that wrote it: "
    "`tf.keras.models.load_model(path).save('model.h5')`"
)
_TUPLES = ("__tuple__", "TensorShape")


class FileError(ValueError):
    """A file, or a part of one, that cannot be loaded; the message says why."""


class Weights(NamedTuple):
    """The weights of a model: per layer that has any, its name and its datasets."""

    groups: list[tuple[str, dict[str, h5py.Dataset]]]
    backend: str


@contextlib.contextmanager
def open_file(path):
    """Open a file as an `h5py.File`, or as a dict if it is JSON."""
    if path.is_dir():
        raise FileError(f"it is a folder, such as a SavedModel. {_RESAVE}")
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if h5py.is_hdf5(path):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise FileError(f"it is damaged: {error}") from error
        with file:
            yield file
    elif start == _ZIP:
        reason = "it is a zip archive, not HDF5. If Keras 3 wrote it, call"
        raise FileError(f"{reason} `keras.saving.load_model`. If not: {_RESAVE}")
    elif start.lstrip()[:1] in (b"{", b'"'):
        config = _decode(path.read_bytes())
        # `json.dump(model.to_json(), file)` encodes twice.
        yield _decode(config) if isinstance(config, str) else config
    else:
        raise FileError(f"it is neither HDF5 nor JSON. {_RESAVE}")


def read_config(file):
    """The configuration of the model: a dict with `class_name` and `config`."""
    config = file
    if isinstance(file, h5py.File):
        config = _text(file.attrs.get("model_config"))
        if config is None:
            reason = "it has weights, but no architecture. Pass the architecture as"
            raise FileError(f"{reason} `path`, and this file as `weights`.")
        config = _decode(config)
        _check_version(file.attrs.get("keras_version"))
    if not isinstance(config, dict) or "class_name" not in config:
        raise FileError("its architecture is not that of a Keras model.")
    _check_version(config.get("keras_version"))
    return config


def read_weights(file):
    """The `Weights` of an HDF5 file of a model, or of weights only."""
    if not isinstance(file, h5py.File):
        raise FileError("it has an architecture, but no weights. Pass `weights=`.")
    root = (
        _child(file, "model_weights", h5py.Group) if "model_weights" in file else file
    )
    version = _text(root.attrs.get("keras_version", file.attrs.get("keras_version")))
    _check_version(version)
    names = _names(root, "layer_names")
    if names is None:
        remedy = (
            "`save_weights` of Keras 2 writes them to files not named `.weights.h5`"
        )
        raise FileError(f"its weights are not stored by `layer_names`. {remedy}.")
    groups = []
    for name in names:
        group = _child(root, name, h5py.Group)
        weights = _names(group, "weight_names") or []
        if weights:
            arrays = {weight: _child(group, weight, h5py.Dataset) for weight in weights}
            if len(arrays) < len(weights):
                raise FileError(f"layer {name!r} has two weights of the same name.")
            groups.append((name, arrays))
    if _names(root.get("top_level_model_weights"), "weight_names"):
        raise FileError("its model has weights outside its layers.")
    return Weights(groups, _text(root.attrs.get("backend")) or "tensorflow")


def read_array(name, dataset, shape):
    """The array of a dataset, which must have the shape; read only if it has."""
    if dataset.shape != shape:
        raise FileError(f"`{name}` must have shape {shape}. Received: {dataset.shape}")
    if dataset.dtype.kind not in "fiub":
        raise FileError(f"`{name}` must hold numbers. Received: dtype={dataset.dtype}")
    return np.asarray(dataset[()])


def _decode(text):
    """Decode JSON, with the tuples and arrays that some versions store as dicts."""

    def decode(value):
        if value.get("class_name") in _TUPLES:
            return value["items"]
        return value["value"] if value.get("type") == "ndarray" else value

    try:
        return json.loads(text, object_hook=decode)
    except (ValueError, KeyError) as error:
        raise FileError(f"its architecture is not valid JSON: {error}") from error


def _check_version(version):
    major = (_text(version) or "2").partition(".")[0]
    if major == "1":
        reason = "Keras 1 wrote it. Open and save it with Keras 2.0 to 2.3"
        raise FileError(f"{reason} first. Received: keras_version={version!r}")
    if major != "2":
        remedy = "Call `keras.saving.load_model` for it"
        raise FileError(f"Keras 2 did not write it. {remedy}. Received: {version=}")


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return None if value is None else str(value)


def _names(group, key):
    """Read a list of names, of which h5py splits long ones into numbered attributes."""
    if group is None:
        return None
    if key in group.attrs:
        return [_text(name) for name in np.ravel(group.attrs[key])]
    names, k = [], 0
    while f"{key}{k}" in group.attrs:
        names += [_text(name) for name in np.ravel(group.attrs[f"{key}{k}"])]
        k += 1
    return names if k else None


def _child(group, path, kind):
    """A group or dataset that is stored in this file; other files are not opened."""
    child = group
    for name in path.strip("/").split("/"):
        link = child.get(name, getlink=True) if isinstance(child, h5py.Group) else None
        if not isinstance(link, h5py.HardLink):
            raise FileError(f"{path!r} is missing in {group.name!r}.")
        child = child[name]
    is_elsewhere = kind is h5py.Dataset and (child.external or child.is_virtual)
    if not isinstance(child, kind) or is_elsewhere:
        raise FileError(f"{path!r} in {group.name!r} is not stored in the file.")
    return child
