"""Experiments on a trained LSTM: edits, ablation, gradients, attribution."""

from keras_scratch_lstm.experiments.ablation import Ablation, ablate_units
from keras_scratch_lstm.experiments.attribution import attribute
from keras_scratch_lstm.experiments.decomposition import (
    Decomposition,
    contextual_decomposition,
)
from keras_scratch_lstm.experiments.edits import Edit, run_with_edits
from keras_scratch_lstm.experiments.gradients import trace_gradients
from keras_scratch_lstm.experiments.scores import Attribution

__all__ = [
    "Ablation",
    "Attribution",
    "Decomposition",
    "Edit",
    "ablate_units",
    "attribute",
    "contextual_decomposition",
    "run_with_edits",
    "trace_gradients",
]
