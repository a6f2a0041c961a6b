"""What acts on a fused weight as on the weights of its gates, and what does not.

The migration guide lists both; the lists are compared with what Keras does.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from keras import constraints, layers, ops, optimizers, regularizers

from keras_scratch_lstm import ScratchLSTMCell, to_scratch

GUIDE = Path(__file__).parents[1] / "docs" / "from-keras.md"
numpy = ops.convert_to_numpy
# Wrappers of other optimizers.
WRAPPERS = {"LossScaleOptimizer", "MultiOptimizer"}
CLIPPING = [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.1}]
REMEDIES = {"global_clipnorm"}  # that a line of the list names, too
AXES = {"axis=0": {"axis": 0}, "axis=1": {"axis": 1}}

pytestmark = pytest.mark.one_backend


def classes(module, base):
    """The public classes of a Keras module by name."""
    found = {v for v in vars(module).values() if isinstance(v, type)}
    found = {v for v in found if issubclass(v, base) and v is not base}
    return {v.__name__: v for v in found if v.__name__ not in WRAPPERS}


def split(fused):
    """Weights of the built-in cell in the order of ours."""
    parts = [np.split(numpy(weight), 4, -1) for weight in fused]  # i, f, c, o
    return [part[gate] for gate in (0, 1, 3, 2) for part in parts]


def differs(make, rng):
    """Whether an optimizer gives other weights after three equal gradients."""
    builtin = layers.LSTM(4)
    builtin.build((None, 5, 3))
    builtin.set_weights([rng.normal(size=weight.shape) for weight in builtin.weights])
    scratch, fused, named = to_scratch(builtin), make(), make()
    before = [numpy(weight).copy() for weight in builtin.weights]
    for _ in range(3):
        gradients = [rng.normal(size=w.shape).astype("float32") for w in before]
        for optimizer, layer, values in (
            (fused, builtin, gradients),
            (named, scratch, split(gradients)),
        ):
            tensors = [ops.convert_to_tensor(value) for value in values]
            optimizer.apply(tensors, layer.trainable_variables)
    for weight, old in zip(builtin.weights, before, strict=True):
        assert not np.allclose(numpy(weight), old)
    pairs = zip(scratch.weights, split(builtin.weights), strict=True)
    return not all(np.allclose(one, other, atol=1e-6) for one, other in pairs)


def listed(line):
    """The names in code style in a line of the guide's list."""
    (text,) = re.findall(
        rf"^- \*\*{line}\*\*:((?:.|\n(?!- |\n))*)", GUIDE.read_text(), re.M
    )
    return set(re.findall(r"`([^`]+)`", text))


def test_optimizers(rng):
    different = {
        name
        for name, cls in classes(optimizers, optimizers.Optimizer).items()
        if differs(lambda cls=cls: cls(0.01), rng)
    }
    options = [*CLIPPING, {"use_ema": True}, {"weight_decay": 0.1}]
    different |= {
        next(iter(option))
        for option in options
        if differs(lambda option=option: optimizers.SGD(0.1, **option), rng)
    }
    assert different == listed("Other weights with these optimizers") - REMEDIES
    names = {
        *classes(optimizers, optimizers.Optimizer),
        *(k for o in options for k in o),
    }
    assert names - different <= listed("The same weights with these")


@pytest.mark.parametrize(
    ("kind", "weight"),
    [  # Keras has no regularizer that would act across the gates of a bias.
        ("regularizer", "kernel"),
        ("regularizer", "recurrent"),
        ("constraint", "kernel"),
        ("constraint", "recurrent"),
        ("constraint", "bias"),
    ],
)
def test_rejects_what_acts_across_gates(rng, kind, weight):
    """The constructor accepts a value if it is the same for a fused weight."""
    base = {
        "regularizer": regularizers.Regularizer,
        "constraint": constraints.Constraint,
    }
    module = {"regularizer": regularizers, "constraint": constraints}[kind]
    shape, argument = (4,) if weight == "bias" else (4, 4), f"{weight}_{kind}"
    gates = [rng.normal(size=shape).astype("float32") for _ in "ifco"]
    accepted, rejected = set(), set()
    for name, cls in classes(module, base[kind]).items():
        has_axis = name in ("MaxNorm", "MinMaxNorm", "UnitNorm")
        for axis in AXES if has_axis and weight != "bias" else [""]:
            value = cls(**AXES.get(axis, {}))
            each = [numpy(value(ops.convert_to_tensor(gate))) for gate in gates]
            fused = numpy(value(ops.convert_to_tensor(np.concatenate(gates, -1))))
            together = sum(each) if kind == "regularizer" else np.concatenate(each, -1)
            label = f"{name}({axis})" if axis else name
            if np.allclose(fused, together, rtol=1e-5):
                ScratchLSTMCell(4, **{argument: value})
                accepted.add(label)
                continue
            rejected.add(label)
            with pytest.raises(ValueError, match=f"{name}, which acts across gates"):
                ScratchLSTMCell(4, **{argument: value})
            with pytest.raises(ValueError, match="acts across gates"):
                to_scratch(layers.LSTM(4, **{argument: value}))
            ScratchLSTMCell(4, **{argument: {"f": value}})
    if weight == "kernel":
        assert accepted <= listed("The same weights with these")
        assert rejected <= listed("Rejected by the constructor")
    assert accepted
    assert rejected


def test_custom_regularizers_are_applied_to_each_gate(rng):
    cell = ScratchLSTMCell(4, kernel_regularizer=lambda weight: ops.max(weight))
    cell.build((None, 3))
    values = [rng.normal(size=weight.shape) for weight in cell.weights]
    cell.set_weights(values)
    np.testing.assert_allclose(
        np.sum([numpy(loss) for loss in cell.losses]),
        sum(value.max() for value in values[::3]),
        rtol=1e-6,
    )
