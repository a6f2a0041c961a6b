"""Read and write the files of traces."""

import contextlib
import os
import secrets
import stat
import zipfile
from pathlib import Path

import numpy as np

from keras_scratch_lstm import _validation

_FORMAT = "keras_scratch_lstm.{} 1"  # the name of the class


def write_file(path, write):
    """Call `write` with a binary file that then replaces the one at `path`.

    An error leaves a previous file unchanged. Symbolic links are followed, and a
    previous file's mode and owner are kept. Devices, pipes and files with several hard
    links are written directly.
    """
    path = _validation.path("path", path)
    try:
        previous = os.stat(path)
    except FileNotFoundError:
        previous = None
    if previous is not None and not _is_replaceable(path, previous):
        with open(path, "wb") as file:
            write(file)
        return
    target = os.path.realpath(path)
    if previous is not None:
        open(target, "r+b").close()  # raises an error for a read-only file
    # Independent of the name of the target, which may be as long as names can be.
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    with contextlib.ExitStack() as on_error:
        with open(temporary, "xb") as file:
            on_error.callback(os.unlink, temporary)
            write(file)
        if previous is not None:
            with contextlib.suppress(AttributeError, PermissionError):
                os.chown(temporary, previous.st_uid, previous.st_gid)
            os.chmod(temporary, stat.S_IMODE(previous.st_mode))
        os.replace(temporary, target)
        on_error.pop_all()


def _is_replaceable(path, status):
    # `/dev/stdout` may be a regular file that another process has open.
    is_special = Path(os.path.abspath(path)).parts[1:2] in [("dev",), ("proc",)]
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and not is_special


def save_arrays(path, kind, arrays):
    """Save a dict of arrays of a class in the format of `GateTrace.save`."""
    content = {"format": np.array(_FORMAT.format(kind)), **arrays}
    write_file(path, lambda file: np.savez(file, **content))


def load_arrays(path, kind, convert):
    """Return `convert` of what `save_arrays` saved, without unpickling any of it."""
    path = _validation.path("path", path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        # Opening a pipe would wait for its writer.
        raise _validation.invalid("path", str(path), "a regular file")
    with open(path, "rb") as file:
        try:
            return convert(_read(file, kind))
        except Exception as error:  # whatever a damaged file leads to
            rule = f"an undamaged file written by `{kind}.save`"
            raise _validation.invalid("path", str(path), rule) from error


def _read(file, kind):
    if not zipfile.is_zipfile(file):
        raise ValueError("no archive")
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    arrays = np.load(file, allow_pickle=False)
    members = arrays.zip.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("compressed")
    if sum(member.file_size for member in members) > size:
        raise ValueError("larger than the file")
    if str(arrays["format"]) != _FORMAT.format(kind):
        raise ValueError("format")
    return {name: arrays[name] for name in arrays.files}
