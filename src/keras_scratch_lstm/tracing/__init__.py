"""Trace the gates of a trained LSTM."""

from keras_scratch_lstm.tracing.gates import trace_gates
from keras_scratch_lstm.tracing.monitor import GateMonitor
from keras_scratch_lstm.tracing.tokens import token_features
from keras_scratch_lstm.tracing.trace import GateTrace, Gradients, Saturation

__all__ = [
    "GateMonitor",
    "GateTrace",
    "Gradients",
    "Saturation",
    "token_features",
    "trace_gates",
]
