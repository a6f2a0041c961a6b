"""Comparison with the built-in layers, in cases drawn by Hypothesis.

`HYPOTHESIS_PROFILE=full`, as in CI, draws three times as many; `deep`, as every night,
eight times; `long` 160 times.
"""

import os
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from gradients import BACKEND, double_precision, with_gradients
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import layers, ops
from reference import fuse

from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell, recurrence

# Every night more than 1,000 in all, the fewest on JAX, which compiles each of them.
pytestmark = pytest.mark.ci
EXAMPLES = {"tensorflow": 30, "torch": 90, "jax": 5}[BACKEND]
EXAMPLES_OF_FIT = {"tensorflow": 1, "torch": 3, "jax": 1}[BACKEND]
for profile, factor in {"quick": 1, "full": 3, "deep": 8, "long": 160}.items():
    settings.register_profile(
        profile,
        max_examples=factor * EXAMPLES,
        deadline=None,
        print_blob=True,
        phases=set(Phase) - {Phase.explain},  # which makes tests three times slower
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# Relative to the largest value in an array, or to 1. In float64, some of Keras's own
# operations compute in float32 on JAX and torch.
TOLERANCES = {
    "float32": 3e-5,
    "float64": 1e-12 if BACKEND == "tensorflow" else 3e-5,
    "mixed_float16": 2e-2,
    "mixed_bfloat16": 1e-1,
}


@st.composite
def cases(draw):
    """The arguments of a layer and of a call."""
    sizes, booleans = st.integers(1, 5), st.booleans()

    def one_of(*values):
        return draw(st.sampled_from(values))

    wrapper = one_of("layer", "layer", "layer", "RNN", "Bidirectional")
    policy = one_of(*TOLERANCES)
    smooth = policy.startswith("mixed") or draw(booleans)
    cell = {
        "units": draw(sizes),
        "activation": "tanh" if smooth else one_of("relu", None),
        "recurrent_activation": "sigmoid" if smooth else "hard_sigmoid",
        "use_bias": draw(booleans),
        "kernel_initializer": "zeros",  # the fastest; `pair` sets the weights
        "recurrent_initializer": "zeros",
        "recurrent_regularizer": one_of(None, "l2"),
        "bias_constraint": one_of(None, "non_neg"),
        "dropout": one_of(0, 0, 0.4),
        "recurrent_dropout": one_of(0, 0, 0.4),
        "seed": 3,
    }
    sequence = {
        "return_sequences": draw(booleans),
        "go_backwards": wrapper != "Bidirectional" and draw(booleans),
        "unroll": draw(booleans),
    }
    stateful, return_state = draw(booleans), draw(booleans)
    if wrapper == "Bidirectional" and stateful:
        return_state = False  # Keras does not support both
    if BACKEND == "torch" and wrapper == "RNN" and policy.startswith("mixed"):
        stateful = False  # Keras's own `RNN` loses its states
    batch, time, features = draw(sizes), draw(sizes), draw(sizes)
    mask = draw(st.none() | arrays(bool, (batch, time)))
    backwards = sequence["go_backwards"] or wrapper == "Bidirectional"
    if BACKEND == "torch" and sequence["unroll"] and backwards:
        mask = None  # Keras itself fails
    # Rounding must not move a value across a kink, nor grow with large weights.
    scales = (0.3, 1.0, 3.0) if smooth else (0.1, 0.5)
    if policy.startswith("mixed"):
        scales = (0.3, 1.0)
    return {
        "wrapper": wrapper,
        "implementation": one_of(None, None, None, "loop"),
        "cell": cell,
        "sequence": sequence,
        "return_state": return_state,
        "stateful": stateful,
        "time_major": draw(booleans),
        "policy": policy,
        "shape": (batch, time, features),
        "mask": mask,
        "training": draw(booleans),
        "initial_state": draw(booleans),
        "scale": one_of(*scales),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def pair(case, rng):
    """Our layer and the built-in one, with the same random weights.

    The built-in one is never stateful and always returns its states.
    """
    cell, dtype = {**case["cell"], "dtype": case["policy"]}, case["policy"]
    arguments = {**case["sequence"], "dtype": dtype}
    only_ours = {"return_state": case["return_state"], "stateful": case["stateful"]}
    if case["wrapper"] == "RNN":
        ours = layers.RNN(ScratchLSTMCell(**cell), **arguments, **only_ours)
        theirs = layers.RNN(layers.LSTMCell(**cell), **arguments, return_state=True)
    else:
        time_major = case["time_major"] and case["wrapper"] == "layer"
        arguments |= case["cell"]
        ours = ScratchLSTM(**arguments, **only_ours, time_major=time_major)
        theirs = layers.LSTM(**arguments, return_state=True)
    if case["wrapper"] == "Bidirectional":
        ours = layers.Bidirectional(ours, dtype=dtype)
        theirs = layers.Bidirectional(theirs, dtype=dtype)
    batch, time, features = case["shape"]
    theirs.build((batch, time, features))
    ours.build((time, batch, features) if is_time_major(ours) else case["shape"])
    for one, other in zip(directions(ours), directions(theirs), strict=True):
        values = [rng.normal(0, case["scale"], w.shape) for w in one.cell.weights]
        one.cell.set_weights(values)
        other.cell.set_weights(fuse(values))
    return ours, theirs


def directions(layer):
    """A list of the layer, or the two layers of a `Bidirectional`."""
    if isinstance(layer, layers.Bidirectional):
        return [layer.forward_layer, layer.backward_layer]
    return [layer]


def is_time_major(layer):
    return getattr(layer, "time_major", False)


def call(layer, x, states, mask, training):
    """Call a layer on batch-major inputs; returns batch-major outputs."""
    time_major = is_time_major(layer)
    if time_major:
        x, mask = (None if a is None else ops.swapaxes(a, 0, 1) for a in (x, mask))
    outputs = layer(x, initial_state=states, mask=mask, training=training)
    if not (time_major and layer.return_sequences):
        return outputs
    output, *states = keras.tree.flatten(outputs)
    return [ops.swapaxes(output, 0, 1), *states]


def train(layer, case, x, states):
    """One step of SGD on a loss of the outputs, and of the states if returned.

    Returns `(outputs, gradients, weights)`: the gradients with respect to `x` and
    `states`, and the weights after the step.
    """
    variables = layer.trainable_variables

    def loss_and_outputs(x, *states):
        outputs = call(layer, x, states or None, case["mask"], case["training"])
        outputs = keras.tree.flatten(outputs)
        rng, loss = np.random.default_rng(0), sum(layer.losses)
        for output in outputs if case["return_state"] else outputs[:1]:
            weights = ops.convert_to_tensor(
                rng.normal(size=output.shape), dtype=layer.variable_dtype
            )
            loss += ops.sum(ops.cast(output, layer.variable_dtype) * weights)
        stored = [each.states for each in directions(layer) if each.stateful]
        return loss, outputs + [s.value for s in keras.tree.flatten(stored)]

    outputs, gradients = with_gradients(loss_and_outputs, variables)(x, *states)
    updates = [ops.convert_to_tensor(g) for g in gradients[: len(variables)]]
    keras.optimizers.SGD(0.5).apply(updates, variables)
    weights = [each.cell.get_weights() for each in directions(layer)]
    return outputs, gradients[len(variables) :], weights


def assert_close(ours, theirs, policy):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        one, other = one.astype("float64"), other.astype("float64")
        tolerance = TOLERANCES[policy] * max(1, abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def assert_close_weights(ours, theirs, policy):
    for one, other in zip(ours, theirs, strict=True):
        assert_close(fuse(one), other, policy)


def compare_training_step(case):
    rng = np.random.default_rng(case["seed"])
    ours, theirs = pair(case, rng)
    sizes = [size for each in directions(ours) for size in each.state_size]

    def draw(*shape):
        return rng.normal(size=shape).astype(ours.variable_dtype)

    x = draw(*case["shape"])
    states, stored = ([draw(len(x), size) for size in sizes] for _ in range(2))
    if case["stateful"]:
        variables = [state for each in directions(ours) for state in each.states]
        for variable, value in zip(variables, stored, strict=True):
            variable.assign(value)
    if case["initial_state"]:
        initial = states
    else:
        initial, states = stored if case["stateful"] else [], []

    with recurrence.force(case["implementation"]):
        our_outputs, our_gradients, our_weights = train(ours, case, x, states)
    (output, *last), gradients, weights = train(theirs, case, x, initial)

    for one, other in zip(our_outputs, [output, *last], strict=False):
        assert one.dtype == other.dtype or case["stateful"]
    copies = case["return_state"] + case["stateful"]
    assert_close(our_outputs, [output, *copies * last], case["policy"])
    assert_close(our_gradients, gradients[: 1 + len(states)], case["policy"])
    assert_close_weights(our_weights, weights, case["policy"])


def precision_of(case):
    return double_precision() if case["policy"] == "float64" else nullcontext()


@given(cases())
def test_training_step_matches_builtin(case):
    with precision_of(case):
        compare_training_step(case)


def fit(layer, case, data, known_shape, jit_compile):
    """Two epochs of `fit`; returns the predictions and the weights after it."""
    batch, unrolled = case["shape"][0], case["sequence"]["unroll"]
    inputs = {}
    for name, array in data.items():
        shape = [batch, *array.shape[1:]] if known_shape else [None, *array.shape[1:]]
        if name in ("x", "mask") and not known_shape and not unrolled:
            shape[1] = None
        inputs[name] = keras.Input(batch_shape=shape, dtype=array.dtype, name=name)
    states = [inputs[name] for name in data if name.startswith("state")]
    outputs = call(layer, inputs["x"], states or None, inputs.get("mask"), None)
    outputs = keras.tree.flatten(outputs)
    model = keras.Model(inputs, outputs if case["return_state"] else outputs[:1])
    model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)

    def predict():
        predictions = model.predict(data, batch, verbose=0)
        return [p.astype(layer.variable_dtype) for p in keras.tree.flatten(predictions)]

    targets = [np.zeros_like(prediction) for prediction in predict()]
    model.fit(data, targets, batch, epochs=2, shuffle=False, verbose=0)
    return predict(), [each.cell.get_weights() for each in directions(layer)]


@settings(max_examples=settings.default.max_examples * EXAMPLES_OF_FIT // EXAMPLES)
@given(case=cases(), known_shape=st.booleans(), xla=st.booleans())
def test_fit_matches_builtin(case, known_shape, xla):
    # Swapping axes would lose the mask, which the loss needs.
    case = {**case, "stateful": False, "time_major": False}
    if case["policy"] == "float64":  # `fit` itself fails with a regularizer
        case["cell"] = {**case["cell"], "recurrent_regularizer": None}
    jit_compile = xla if BACKEND == "tensorflow" else "auto"
    batch, time, features = case["shape"]
    rng = np.random.default_rng(case["seed"])

    def draw(*shape):  # two batches
        return rng.normal(size=(2 * batch, *shape)).astype(dtype)

    with precision_of(case), recurrence.force(case["implementation"]):
        both = pair(case, rng)
        dtype = both[0].variable_dtype
        data = {"x": draw(time, features)}
        if case["mask"] is not None:
            data["mask"] = np.concatenate([case["mask"], case["mask"][::-1]])
        if case["initial_state"]:
            sizes = [size for each in directions(both[0]) for size in each.state_size]
            data |= {f"state_{k}": draw(size) for k, size in enumerate(sizes)}
        ours, theirs = (
            fit(layer, case, data, known_shape, jit_compile) for layer in both
        )
    # Training that diverges amplifies rounding errors without bounds.
    assume(all(abs(value).max() < 1e3 for value in theirs[0]))
    assert_close(ours[0], theirs[0], case["policy"])
    assert_close_weights(ours[1], theirs[1], case["policy"])
