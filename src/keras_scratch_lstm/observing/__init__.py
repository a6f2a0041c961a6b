"""Run a trained model, and record or change the arrays of its recurrent layers."""
