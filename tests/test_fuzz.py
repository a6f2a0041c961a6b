"""Whatever the arguments: a result, or an error that names one of them.

A few hundred cases each, always the same; `HYPOTHESIS_PROFILE=long` draws 10,000 new
ones. `SLOW` is by how much less where each takes some ten milliseconds.
"""

import copy
import inspect
import os

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers, ops

from keras_scratch_lstm import (
    GateMonitor,
    GateTrace,
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    ScratchLSTMCell,
    from_torch,
    to_builtin,
    to_scratch,
    to_torch,
    trace_gates,
)
from keras_scratch_lstm.tracing.trace import ARRAYS

# bad_inputs/ has the same sentences on each backend.
pytestmark = pytest.mark.one_backend

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
CASES = 10_000 if LONG else 200
SLOW = 1 if LONG else 4


def fuzz(cases):
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=not LONG,
        database=None,
        print_blob=True,
        phases=set(Phase) - {Phase.explain},
        suppress_health_check=list(HealthCheck),
    )


# --- what may come -----------------------------------------------------------

NUMBERS = (
    st.integers(-3, 9)
    | st.sampled_from([2**31, 2**63, -(2**70), 0.5, -0.0, 1e300])
    | st.floats()
)
ARRAY = hnp.arrays(
    st.sampled_from(["float32", "float64", "int32", "bool", "complex64", "U2", "O"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.sampled_from([1j, int, object, print, len, ..., slice(1), range(3), set()])
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["i", "f", "o", "c", "class_name", "config", "module", "x"])
            | st.text(max_size=4),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
ANYTHING = SCALARS | ARRAY | JSON

FLAG = st.booleans()
FRACTION = st.floats(0, 1)
INITIALIZER = st.sampled_from(["zeros", "orthogonal", keras.initializers.HeNormal()])
REGULARIZER = st.sampled_from([None, "l2", keras.regularizers.L1(0.1)])
CONSTRAINT = st.sampled_from([None, "non_neg", keras.constraints.MaxNorm(2)])
ACTIVATION = st.sampled_from(["tanh", "sigmoid", None, keras.activations.relu])


def by_gate(strategy):
    return strategy | st.dictionaries(st.sampled_from("ifoc"), strategy)


def fitting(name):
    """What fits an argument of a layer."""
    kinds = {
        "initializer": by_gate(INITIALIZER),
        "regularizer": by_gate(REGULARIZER),
        "constraint": by_gate(CONSTRAINT),
        "activation": ACTIVATION,
        "dropout": FRACTION,
        "units": st.integers(1, 5),
        "seed": st.none() | st.integers(0, 99),
        "cudnn": st.sampled_from(["auto", False]),
        "cell": st.none(),
        "dtype": st.sampled_from([None, "float32", "mixed_bfloat16"]),
        "name": st.none() | st.just("one"),
    }
    if name == "activity_regularizer":
        return REGULARIZER
    return kinds.get(name.rpartition("_")[2], FLAG)


@st.composite
def arguments(draw, function, wanted=(), extra=()):
    """Some of the arguments, most of them fitting."""
    names = [*inspect.signature(function).parameters, *extra]
    names = [name for name in names if name not in ("kwargs", "self")]
    chosen = draw(st.sets(st.sampled_from(names), max_size=4)) | set(wanted)
    return {
        name: draw(ANYTHING if draw(st.integers(0, 2)) == 0 else fitting(name))
        for name in sorted(chosen)
    }


def outcome(call, *names):
    """The result, or None after an error that names one of the arguments."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        raised = error
    assert not isinstance(raised, UnicodeError), raised
    assert any(name in str(raised) for name in names), raised
    return None


def names_of(given):
    return [f"`{name}`" for name in given] + [f"`state_dict[{name}" for name in given]


# --- constructors ------------------------------------------------------------


@fuzz(CASES)
@given(arguments(ScratchLSTMCell, ["units"], ["name", "dtype", "trainable"]))
def test_a_cell(given):
    outcome(lambda: ScratchLSTMCell(**given), *given)


@fuzz(CASES // SLOW)
@given(arguments(ScratchLSTM, ["units"], ["name", "dtype", "trainable"]))
def test_a_layer(given):
    outcome(lambda: ScratchLSTM(**given), *given)


@fuzz(CASES)
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ["name", "from_logits", "ignore_class", "dtype"], ANYTHING
        ),
    )
)
def test_a_metric(given):
    outcome(lambda: Perplexity(**given), *given)


@fuzz(CASES)
@given(ANYTHING, ANYTHING, ANYTHING)
def test_callbacks(verbose, probe, layer):
    outcome(lambda: PerplexityLogger(verbose), "`verbose`")
    outcome(lambda: GateMonitor(probe, layer), "`probe`", "`layer`")


F = np.full((2, 3, 4), 0.5, "float32")


@fuzz(CASES)
@given(
    st.dictionaries(
        st.sampled_from([*ARRAYS, "mask", "layer", "backward"]), ANYTHING, max_size=2
    )
)
def test_a_trace(given):
    names = names_of([*ARRAYS, "mask", "layer", "backward"])
    trace = outcome(lambda: GateTrace(**dict.fromkeys(ARRAYS, F) | given), *names)
    if trace is not None:
        repr(trace)
        trace.saturation()


# --- functions ---------------------------------------------------------------


@pytest.fixture(scope="module")
def lstm():
    layer = ScratchLSTM(4, name="one")
    layer.build((None, 5, 3))
    layer(np.zeros((2, 5, 3), "float32"))
    return layer


X = np.ones((2, 5, 3), "float32")


@fuzz(CASES // SLOW)
@given(
    model=st.none() | ANYTHING,
    inputs=st.just(X) | ANYTHING,
    layer=st.none() | ANYTHING,
    batch_size=st.just(2) | ANYTHING,
)
def test_tracing(lstm, model, inputs, layer, batch_size):
    outcome(
        lambda: trace_gates(
            lstm if model is None else model, inputs, layer, batch_size
        ),
        "`model_or_layer`",
        "`inputs`",
        "`layer`",
        "`batch_size`",
        "Input 0",  # Keras's check of the shape
        "Inputs to a layer should be tensors",
        "positional arguments",
    )


@fuzz(CASES)
@given(ANYTHING)
def test_converting(anything):
    for convert in (to_scratch, to_builtin):
        outcome(lambda convert=convert: convert(anything), "`layer_or_model`")
    outcome(lambda: to_torch(anything), "`layer`")
    outcome(lambda: from_torch(anything), "`state_dict")


@fuzz(CASES // SLOW)
@given(
    st.fixed_dictionaries(
        {
            "weight_ih_l0": st.just(np.ones((16, 3))) | ANYTHING,
            "weight_hh_l0": st.just(np.ones((16, 4))) | ANYTHING,
        },
        optional=dict.fromkeys(["bias_ih_l0", "bias_hh_l0"], ANYTHING),
    )
)
def test_weights_from_torch(state_dict):
    outcome(lambda: from_torch(state_dict), "`state_dict")


TRACE = GateTrace(**dict.fromkeys(ARRAYS, F))


@fuzz(CASES // SLOW)
@given(
    path=st.none() | NUMBERS | st.just("page.html") | st.binary(max_size=4),
    tokens=st.just("abc") | st.lists(st.text(max_size=3), max_size=4) | ANYTHING,
    sample=st.integers(-1, 2) | ANYTHING,
)
def test_pages_and_tables(tmp_path_factory, path, tokens, sample):
    folder = tmp_path_factory.getbasetemp()
    path = folder / path if isinstance(path, str) else path
    if "html" in OPTIONAL:
        outcome(
            lambda: TRACE.to_html(path, tokens, sample),
            "`path`",
            "`tokens`",
            "`sample`",
        )
    if "table" in OPTIONAL:
        outcome(lambda: TRACE.to_dataframe(tokens), "`tokens`")
        outcome(lambda: TRACE.to_dataframe([tokens, "abc"]), "`tokens`")
    outcome(lambda: TRACE.save(path), "`path`")


OPTIONAL = {"html"}
for feature, package in {
    "table": "pandas",
    "plot": "matplotlib",
}.items():
    try:
        __import__(package)
        OPTIONAL.add(feature)
    except ImportError:
        pass


@pytest.mark.skipif("plot" not in OPTIONAL, reason="matplotlib is not installed")
@fuzz(CASES // SLOW // 5)
@given(
    which=st.sampled_from(
        ["plot_gates", "plot_heatmap", "plot_saturation", "plot_text"]
    ),
    given=st.fixed_dictionaries(
        {},
        optional={
            "units": st.integers(0, 3) | ANYTHING,
            "unit": st.integers(0, 3) | ANYTHING,
            "array": st.sampled_from(ARRAYS) | ANYTHING,
            "tokens": st.just("abc") | ANYTHING,
            "sample": st.integers(0, 1) | ANYTHING,
            "steps": st.none() | ANYTHING,
            "ax": st.none() | ANYTHING,
            "path": st.none() | NUMBERS | st.binary(max_size=3),
        },
    ),
)
def test_plotting(which, given):
    from keras_scratch_lstm import plotting

    function = getattr(plotting, which)
    names = set(inspect.signature(function).parameters) - {"trace"}
    given = {name: value for name, value in given.items() if name in names}
    outcome(lambda: function(TRACE, **given), *names)


# --- configurations ----------------------------------------------------------


def paths(value, before=()):
    """Where a configuration may be changed."""
    yield before
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items:
        yield from paths(inner, (*before, key))


def config_of(layer):
    return keras.tree.map_structure(lambda x: x, layer.get_config())


OWN = {
    "units": 3,
    "kernel_regularizer": {"f": "l2"},
    "recurrent_constraint": "max_norm",
    "bias_initializer": {"i": "ones"},
    "dropout": 0.5,
    "seed": 3,
}
# What else an error over a configuration may name, in Keras's words too.
ALWAYS = "cell", "units", "class", "Unrecognized keyword arguments"
CONFIGS = {
    "cell": (ScratchLSTMCell, config_of(ScratchLSTMCell(**OWN))),
    "layer": (ScratchLSTM, config_of(ScratchLSTM(**OWN, activity_regularizer="l1"))),
    "own cell": (ScratchLSTM, config_of(ScratchLSTM(cell=ScratchLSTMCell(**OWN)))),
}


@pytest.mark.parametrize("kind", CONFIGS)
@fuzz(CASES // SLOW)
@given(data=st.data())
def test_a_changed_configuration(kind, data):
    cls, config = CONFIGS[kind]
    config = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from([p for p in paths(config) if p]))
        within = config
        for key in path[:-1]:
            within = within[key]
        value = data.draw(JSON)
        if data.draw(st.booleans()):
            within[path[-1]] = value
        else:
            within.pop(path[-1])
            within[data.draw(st.text(max_size=6))] = value
    names = {key for path in paths(config) for key in path if len(key) > 3}
    layer = outcome(lambda: cls.from_config(config), *names, *ALWAYS)
    if layer is not None:
        assert layer.units > 0
        assert layer.get_config()


# --- conversion --------------------------------------------------------------

UNITS = {"units": st.integers(1, 3)}
BUILTIN = {
    "activation": ACTIVATION,
    "recurrent_activation": ACTIVATION,
    "use_bias": FLAG,
    "unit_forget_bias": FLAG,
    "kernel_initializer": INITIALIZER,
    "kernel_regularizer": st.sampled_from([None, "l2", "orthogonal_regularizer"]),
    "bias_constraint": st.sampled_from([None, "non_neg", "max_norm"]),
    "dropout": FRACTION,
    "seed": st.none() | st.integers(0, 9),
}
OF_LAYER = dict.fromkeys(("return_sequences", "go_backwards", "unroll"), FLAG)
WRAPPERS = {
    "none": lambda layer: layer,
    "bidirectional": layers.Bidirectional,
    "sequential": lambda layer: keras.Sequential([layer]),
    "nested": lambda layer: keras.Sequential([keras.Sequential([layer])]),
    "distributed": layers.TimeDistributed,
}


@fuzz(CASES // SLOW)
@given(data=st.data())
def test_a_random_layer_to_scratch(data):
    given = data.draw(st.fixed_dictionaries(UNITS, optional=BUILTIN))
    if data.draw(st.booleans()):
        given |= data.draw(st.fixed_dictionaries({}, optional=OF_LAYER))
        layer = layers.LSTM(**given)
    else:
        layer = layers.RNN(layers.LSTMCell(**given))
    wrapper = data.draw(st.sampled_from(sorted(WRAPPERS)))
    assume(wrapper != "bidirectional" or not given.get("go_backwards"))
    layer = WRAPPERS[wrapper](layer)
    shape = (2, 2, 3, 2) if wrapper == "distributed" else (2, 3, 2)
    if data.draw(st.booleans()):
        layer.build(shape)
    layer.trainable = data.draw(st.booleans())
    scratch = outcome(lambda: to_scratch(layer), "lstm", "`rnn")
    if scratch is None:
        return
    assert scratch.trainable == layer.trainable
    assert scratch.built == layer.built
    back = to_builtin(scratch)
    for one, other in zip(back.weights, layer.weights, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        )


# --- files -------------------------------------------------------------------


@fuzz(CASES)
@given(data=st.data())
def test_a_damaged_trace_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    TRACE.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content)))
        how = data.draw(st.sampled_from(["cut", "change", "insert", "repeat"]))
        if how == "cut":
            del content[where : where + data.draw(st.integers(1, 400))]
        elif how == "change":
            new = data.draw(st.binary(min_size=1, max_size=8))
            content[where : where + len(new)] = new
        elif how == "insert":
            content[where:where] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            content[where:where] = content[where : where + 100]
    path.write_bytes(content)
    trace = outcome(lambda: GateTrace.load(path), "`path` is ")
    if trace is not None:
        assert trace.i.shape == trace.h.shape


@fuzz(CASES)
@given(
    arrays=st.dictionaries(
        st.sampled_from(["format", "layer", "mask", "backward_i", *ARRAYS]),
        ARRAY.filter(lambda array: array.dtype != object)
        | st.just(F)
        | st.just(np.array([None])),
        max_size=4,
    )
)
def test_a_foreign_trace_file(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "foreign.npz"
    whole = {
        "format": np.array("keras_scratch_lstm.GateTrace 1"),
        "layer": np.array(""),
    }
    np.savez(path, **whole | dict.fromkeys(ARRAYS, F) | arrays)
    trace = outcome(lambda: GateTrace.load(path), "`path` is ")
    if trace is not None:
        assert trace.i.shape == trace.h.shape
