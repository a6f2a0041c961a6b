"""An LSTM for Keras 3 with a weight for every letter of its equations."""

from importlib.metadata import version

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("tensorflow", "jax", "torch"):
        raise
    raise ImportError(
        f"Keras is set to the {error.name} backend, which is not installed: run "
        f"`pip install {error.name}`, or set KERAS_BACKEND to one that is."
    ) from None

from keras_scratch_lstm.callbacks import PerplexityLogger
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.convert import to_builtin, to_scratch
from keras_scratch_lstm.gates import GateTrace, trace_gates
from keras_scratch_lstm.layer import ScratchLSTM
from keras_scratch_lstm.metrics import Perplexity
from keras_scratch_lstm.monitor import GateMonitor

__version__: str = version("keras-scratch-lstm")

__all__ = [
    "GateMonitor",
    "GateTrace",
    "Perplexity",
    "PerplexityLogger",
    "ScratchLSTM",
    "ScratchLSTMCell",
    "to_builtin",
    "to_scratch",
    "trace_gates",
]
