"""Experiments on a trained LSTM: interventions, ablation, gradients, attribution."""

from keras_scratch_lstm.experiments.ablation import Ablation, ablate_units
from keras_scratch_lstm.experiments.attribution import (
    Decomposition,
    contextual_decomposition,
    integrated_gradients,
)
from keras_scratch_lstm.experiments.gradients import trace_gradients
from keras_scratch_lstm.experiments.interventions import Edit, run_with_edits

__all__ = [
    "Ablation",
    "Decomposition",
    "Edit",
    "ablate_units",
    "contextual_decomposition",
    "integrated_gradients",
    "run_with_edits",
    "trace_gradients",
]
