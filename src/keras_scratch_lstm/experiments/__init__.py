"""Experiments on a trained LSTM: interventions, ablation, gradients, attribution."""

from keras_scratch_lstm.experiments.interventions import Edit, run_with_edits

__all__ = ["Edit", "run_with_edits"]
