"""The devices of the backend, by the names that `keras.device` takes."""

import re

import keras
from helpers.common import ExampleError


def find_device(name=None):
    """Returns the device of a name such as "/GPU:0"; by default, the first GPU if any.

    Raises:
        ExampleError: If there is no such device.
    """
    devices = list_devices()
    if name is None:
        return devices[0]
    if (device := normalize(name)) not in devices:
        raise ExampleError(
            f"--device must be one of {', '.join(devices)}. Received: {name}"
        )
    return device


def list_devices():
    """Returns the devices, the CPU last."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        names = [device.name for device in tf.config.list_logical_devices()]
    elif backend == "jax":
        import jax

        names = [*map(str, jax.local_devices()), "cpu"]
    else:
        import torch

        names = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        names += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    devices = dict.fromkeys(filter(None, map(normalize, names)))
    return sorted(devices, key=lambda device: device.startswith("cpu"))


def normalize(name):
    """Returns a device's name as "gpu:0", or `None` if it is of another form."""
    found = re.search(r"(?:^|[/:_])(cpu|gpu|cuda|tpu|mps)[:_]?(\d*)$", name.lower())
    return found and f"{found[1].replace('cuda', 'gpu')}:{int(found[2] or 0)}"
