"""A readable LSTM for Keras 3: every matrix of the equations is its own weight."""

import sys
from importlib.metadata import version

# The command shows its help without Keras, and imports it where it is needed.
_IS_COMMAND = sys.argv[:1] == ["-m"] and __name__ in sys.orig_argv
_IS_COMMAND |= "".join(sys.argv[:1]).endswith(("keras-scratch-lstm", "-lstm.exe"))
if not _IS_COMMAND:
    try:
        import keras  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("tensorflow", "jax", "torch"):
            raise
        raise ImportError(
            f"Keras is set to the {error.name} backend, which is not installed. Run "
            f"`pip install {error.name}`, or set KERAS_BACKEND to an installed one."
        ) from None

    from keras_scratch_lstm.callbacks import PerplexityLogger
    from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
    from keras_scratch_lstm.cells import (
        CoupledLSTMCell,
        DropConnectLSTMCell,
        LayerNormLSTMCell,
        PeepholeLSTMCell,
        ZoneoutLSTMCell,
    )
    from keras_scratch_lstm.convert import (
        from_addons,
        from_torch,
        load_keras2,
        load_keras2_weights,
        to_builtin,
        to_scratch,
        to_torch,
    )
    from keras_scratch_lstm.experiments import (
        Ablation,
        Attribution,
        Decomposition,
        Edit,
        ablate_units,
        attribute,
        contextual_decomposition,
        run_with_edits,
        trace_gradients,
    )
    from keras_scratch_lstm.layer import ScratchLSTM
    from keras_scratch_lstm.litert import LiteRTFile, export_litert
    from keras_scratch_lstm.metrics import Perplexity
    from keras_scratch_lstm.tracing import (
        GateMonitor,
        GateTrace,
        Gradients,
        Saturation,
        token_features,
        trace_gates,
    )

__version__: str = version("keras-scratch-lstm")

__all__ = [
    "Ablation",
    "Attribution",
    "CoupledLSTMCell",
    "Decomposition",
    "DropConnectLSTMCell",
    "Edit",
    "GateMonitor",
    "GateTrace",
    "Gates",
    "Gradients",
    "LayerNormLSTMCell",
    "LiteRTFile",
    "PeepholeLSTMCell",
    "Perplexity",
    "PerplexityLogger",
    "Saturation",
    "ScratchLSTM",
    "ScratchLSTMCell",
    "ZoneoutLSTMCell",
    "ablate_units",
    "attribute",
    "contextual_decomposition",
    "export_litert",
    "from_addons",
    "from_torch",
    "load_keras2",
    "load_keras2_weights",
    "run_with_edits",
    "to_builtin",
    "to_scratch",
    "to_torch",
    "token_features",
    "trace_gates",
    "trace_gradients",
]
