"""With the same seed, our layers and the built-in ones train alike."""

import contextlib

import keras
import numpy as np
import pytest
from gradients import BACKEND, double_precision
from keras import layers

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell

EPOCHS = 20
PAIRS = {
    "layer": (ScratchLSTM, layers.LSTM),
    "cell": (
        lambda units, **run: layers.RNN(ScratchLSTMCell(units), **run),
        lambda units, **run: layers.RNN(layers.LSTMCell(units), **run),
    ),
    "bidirectional": (
        lambda units, **run: layers.Bidirectional(ScratchLSTM(units, **run)),
        lambda units, **run: layers.Bidirectional(layers.LSTM(units, **run)),
    ),
}
# Per policy: the variable dtype, the compute dtype and the tolerance of the losses. In
# float64, some of Keras's ops compute in float32 on JAX and torch.
POLICIES = {
    "float32": ("float32", "float32", 1e-4),
    "float64": ("float64", "float64", 1e-9 if BACKEND == "tensorflow" else 1e-4),
    "mixed_float16": ("float32", "float16", 2e-2),
    "mixed_bfloat16": ("float32", "bfloat16", 1e-1),
}


def train(make, x, y):
    """The losses of training with Adam, and the model."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input(x.shape[1:]), make(8, return_sequences=True), layers.Dense(4)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.03), loss)
    history = model.fit(x, y, batch_size=len(x), epochs=EPOCHS, verbose=0)
    return np.array(history.history["loss"]), model


def dtypes(model, x):
    layer = model.layers[0]
    output = layer(x[:1])
    return {
        "policy": layer.dtype_policy.name,
        "variables": {weight.dtype for weight in layer.weights},
        "compute": layer.compute_dtype,
        "output": keras.backend.standardize_dtype(output.dtype),
    }


@pytest.mark.parametrize(
    ("pair", "policy"),
    [(pair, "float32") for pair in PAIRS]
    + [("layer", policy) for policy in POLICIES if policy != "float32"]
    + [("cell", "mixed_float16"), ("cell", "mixed_bfloat16")],
)
def test_same_seed_gives_the_same_losses(rng, dtype_policy, pair, policy):
    variable, compute, tolerance = POLICIES[policy]
    with double_precision() if policy == "float64" else contextlib.nullcontext():
        dtype_policy(policy)
        x = rng.normal(size=(16, 7, 5)).astype(variable)
        y = rng.integers(0, 4, size=(16, 7))
        (ours, our_model), (theirs, their_model) = (
            train(make, x, y) for make in PAIRS[pair]
        )
        ours_is, theirs_is = dtypes(our_model, x), dtypes(their_model, x)
    assert len(ours) == EPOCHS
    assert theirs[-1] < 0.98 * theirs[0]  # it learns
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert ours_is == theirs_is
    expected = {"variables": {variable}, "compute": compute, "output": compute}
    assert ours_is == {"policy": policy, **expected}
