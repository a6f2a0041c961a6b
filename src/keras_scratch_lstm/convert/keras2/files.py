"""Read the files of Keras 2: HDF5, `.keras` archives, and JSON architectures."""

import contextlib
import io
import json
import re
import zipfile
from typing import Any, NamedTuple

import h5py
import numpy as np

_RESAVE = (
    "In an environment of any version, `pip install tf-keras`, then `tf_keras.models."
    "load_model(path, compile=False).save('model.h5')`, and load that file"
)
# What people have in place of a model: the bytes that it begins with.
_NOT_MODELS = {
    rb"version https://git-lfs": "a Git LFS pointer. Download the file itself, such as "
    "by `git lfs pull`.",
    rb"<(!doctype|html|\?xml)": "a web page. Download the file itself.",
    rb"\Z": "an empty file. Download or copy it again.",
}
_TUPLES = ("__tuple__", "TensorShape")
_METADATA, _CONFIG, _WEIGHTS = "metadata.json", "config.json", "model.weights.h5"
_MOST_TEXT = 2**20  # bytes that any member of an archive may have


class FileError(ValueError):
    """A file, or a part of one, that cannot be loaded; the message says why."""


class Content(NamedTuple):
    """What a file has: its architecture, its HDF5 file, and vocabularies by path."""

    config: Any = None
    weights: h5py.File | None = None
    vocabularies: Any = ()
    version: str | None = None


class Weights(NamedTuple):
    """The weights of a model.

    Attributes:
        groups: Per layer that has any, its name and its datasets; or `None`.
        tree: In files without names of layers, nested dicts of datasets.
        size: Bytes of the file.
        backend: Backend of Keras 2.
    """

    groups: list[tuple[str, dict[str, h5py.Dataset]]] | None
    tree: dict[str, Any]
    size: int
    backend: str = "tensorflow"


@contextlib.contextmanager
def open_file(path):
    """Open a file, and read all but its weights."""
    if path.is_dir():
        raise FileError(f"it is a folder, such as a SavedModel. {_RESAVE}.")
    with path.open("rb") as file:
        start = file.read(100).lstrip()
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            config = _text(file.attrs.get("model_config"))
            version = _text(file.attrs.get("keras_version"))
            yield Content(config and _decode(config), file, version=version)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive, _open_archive(archive, path) as content:
            yield content
    elif start[:1] in (b"{", b'"'):
        config = _decode(path.read_bytes())
        # `json.dump(model.to_json(), file)` encodes twice.
        config = _decode(config) if isinstance(config, str) else config
        version = config.get("keras_version") if isinstance(config, dict) else None
        yield Content(config, version=version)
    else:
        for pattern, kind in _NOT_MODELS.items():
            if re.match(pattern, start, re.IGNORECASE):
                raise FileError(f"it is {kind}")
        raise FileError(
            f"it is neither HDF5, nor a `.keras` archive, nor JSON. {_RESAVE}."
        )


def is_of_keras3(path):
    """Whether Keras 3 wrote the file of a model, by its content."""
    if (path / _CONFIG).exists():  # an archive that was unpacked
        return True
    with open_file(path) as content:
        return _major(content.version) not in ("0", "1", "2")


@contextlib.contextmanager
def _open_archive(archive, path):
    names = archive.namelist()
    if not {_METADATA, _CONFIG} <= set(names):
        raise FileError(f"it is a zip archive, but no model: it has no {_CONFIG!r}.")
    most = max(4 * path.stat().st_size, _MOST_TEXT)

    def read(name):
        """A member, which may be compressed, but not to a fraction of its bytes."""
        size = archive.getinfo(name).file_size
        if size > most:
            rule = f"{name!r} must have at most {most} bytes"
            raise FileError(f"{rule}, as the archive is small. Received: {size}")
        return archive.read(name)

    version = _decode(read(_METADATA)).get("keras_version")
    vocabularies = {
        name: read(name).decode().split("\n")
        for name in names
        if name.endswith("vocabulary.txt")
    }
    content = Content(_decode(read(_CONFIG)), None, vocabularies, version)
    if _WEIGHTS not in names:
        yield content
        return
    with h5py.File(io.BytesIO(read(_WEIGHTS))) as file:
        yield content._replace(weights=file)


def read_config(content):
    """The configuration of the model: a dict with `class_name` and `config`."""
    config = content.config
    if config is None:
        reason = "it has weights, but no architecture. Pass the architecture as `path`"
        remedy = "or call `load_keras2_weights` with the model"
        raise FileError(f"{reason} and this file as `weights`, {remedy}.")
    _check_version(content.version)
    if not isinstance(config, dict) or "class_name" not in config:
        raise FileError("its architecture is not that of a Keras model.")
    return config


def read_weights(content, size):
    """The `Weights` of a file of `size` bytes, of a model or of weights only."""
    file = content.weights
    if file is None:
        raise FileError("it has an architecture, but no weights. Pass `weights=`.")
    root = (
        _child(file, "model_weights", h5py.Group) if "model_weights" in file else file
    )
    version = _text(root.attrs.get("keras_version")) or content.version
    _check_version(version)
    names = _names(root, "layer_names")
    if names is None:
        return Weights(None, _read_tree(root), size)
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
    backend = _text(root.attrs.get("backend")) or "tensorflow"
    return Weights(groups, {}, size, backend)


def _read_tree(root):
    """The datasets of a file as nested dicts; each is visited once, whatever links."""
    tree = {}

    def add(path, item):
        *parents, name = path.split("/")
        if isinstance(item, h5py.Dataset):
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = _stored(item, path)

    root.visititems(add)
    if not tree:
        raise FileError("it has no weights.")
    return tree


def snake_case(name):
    """What Keras 2 calls the objects of a class in a file."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def number(name):
    """The number at the end of a name, 0 if there is none."""
    return int(re.search(r"\d*$", name or "")[0] or 0)


def check_array(name, dataset, shape):
    """Raise an error unless a dataset has numbers and the shape."""
    if dataset.shape != shape:
        raise FileError(f"`{name}` must have shape {shape}. Received: {dataset.shape}")
    if dataset.dtype.kind not in "fiub":
        raise FileError(f"`{name}` must hold numbers. Received: dtype={dataset.dtype}")


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


def _major(version):
    return (_text(version) or "2").partition(".")[0]


def _check_version(version):
    if _major(version) in ("0", "1"):
        reason = "Keras 1 wrote it. Open and save it with Keras 2.0 to 2.3"
        raise FileError(f"{reason} first. Received: keras_version={version!r}")
    if _major(version) != "2":
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
    if not isinstance(child, kind):
        raise FileError(f"{path!r} in {group.name!r} must be a {kind.__name__}.")
    return _stored(child, path) if kind is h5py.Dataset else child


def _stored(dataset, path):
    if dataset.external or dataset.is_virtual:
        raise FileError(f"{path!r} is not stored in the file.")
    return dataset
