import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import assert_close, flat, label

from keras_scratch_lstm import (
    ScratchLSTM,
    from_torch,
    to_builtin,
    to_torch,
)

BATCH, TIME, FEATURES, UNITS = 3, 5, 4, 6
numpy = ops.convert_to_numpy


STATE_DICT = {"weight_ih_l0": (4 * UNITS, FEATURES), "weight_hh_l0": (4 * UNITS, UNITS)}
STATE_DICT |= dict.fromkeys(("bias_ih_l0", "bias_hh_l0"), (4 * UNITS,))


def state_dict(rng):
    return {
        name: rng.normal(size=shape).astype("float32")
        for name, shape in STATE_DICT.items()
    }


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def make_lstm(torch, rng):
    """Make a `torch.nn.LSTM` of a state dict, or of random weights."""

    def make(weights=None, **arguments):
        lstm = torch.nn.LSTM(FEATURES, UNITS, **arguments)
        if weights is None:
            shapes = {key: value.shape for key, value in lstm.state_dict().items()}
            weights = {key: rng.normal(0, 0.5, shape) for key, shape in shapes.items()}
        lstm.load_state_dict({key: torch.tensor(v) for key, v in weights.items()})
        return lstm

    return make


@pytest.fixture
def x(rng):
    return rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")


def run(lstm, x, *states):
    import torch

    with torch.no_grad():
        states = tuple(torch.tensor(state) for state in states) or None
        outputs, (h, c) = lstm(torch.tensor(x), states)
    return outputs.numpy(), h.numpy(), c.numpy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("time_major", [False, True])
def test_outputs_and_states_match_torch(rng, make_lstm, x, bias, time_major):
    options = {"bias": bias, "batch_first": not time_major}
    lstm = make_lstm(**options)
    returns = {"return_sequences": True, "return_state": True}
    layer = from_torch(lstm.state_dict(), **returns, time_major=time_major, name="mine")
    assert (type(layer), layer.name) == (ScratchLSTM, "mine")
    h, c = rng.normal(size=(2, BATCH, UNITS)).astype("float32")
    x = x.swapaxes(0, 1) if time_major else x
    outputs, last_h, last_c = run(lstm, x, h[None], c[None])
    actual = flat(layer(x, initial_state=[h, c]))
    assert_close(actual, [outputs, last_h[0], last_c[0]])

    weights = to_torch(layer)
    assert list(weights) == list(lstm.state_dict())
    again = make_lstm(weights, **options)
    assert_close(run(again, x, h[None], c[None]), [outputs, last_h, last_c])
    np.testing.assert_equal(from_torch(weights).get_weights(), layer.get_weights())
    with pytest.raises(ValueError, match="re-creates `mine` from its configuration"):
        layers.Bidirectional(layer)


@pytest.mark.parametrize(
    ("num_layers", "bidirectional"), [(1, True), (3, False), (2, True)]
)
def test_layers_and_directions_match_torch(
    make_lstm, x, tmp_path, num_layers, bidirectional
):
    options = {"num_layers": num_layers, "bidirectional": bidirectional}
    lstm = make_lstm(batch_first=True, **options)
    result = from_torch(lstm, return_sequences=True, name="converted")
    stack = result if num_layers > 1 else [result]
    layer_class = layers.Bidirectional if bidirectional else ScratchLSTM
    assert {type(layer) for layer in stack} == {layer_class}
    model = keras.Sequential([keras.Input((None, FEATURES)), *stack])
    expected, *_ = run(lstm, x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded, to_builtin(model)):
        assert_close([numpy(each(x))], [expected])
    again = make_lstm(to_torch(result), batch_first=True, **options)
    assert_close(run(again, x)[:1], [expected])


def test_last_outputs_of_both_directions_match_torch(make_lstm, x):
    lstm = make_lstm(bidirectional=True, batch_first=True, num_layers=2)
    _, h, c = run(lstm, x)
    lower, upper = from_torch(lstm, return_state=True)
    last, *states = flat(upper(lower(x)))
    assert_close([last], [np.concatenate([h[2], h[3]], -1)])
    assert_close(states, [h[2], c[2], h[3], c[3]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_tensors_of_any_dtype_that_require_gradients_are_read(
    torch, make_lstm, x, dtype
):
    lstm = make_lstm(batch_first=True).to(getattr(torch, dtype))
    parameters = dict(lstm.named_parameters())
    assert all(parameter.requires_grad for parameter in parameters.values())
    expected, *_ = run(lstm.float(), x)  # exact, but for float64
    actual = from_torch(parameters, return_sequences=True)(x)
    assert_close([numpy(actual)], [expected])


def test_the_lstm_of_a_module_is_found_by_its_prefix(torch, make_lstm, x):
    """Beside weights that are not those of an LSTM."""
    lstm = make_lstm(num_layers=2, batch_first=True)
    modules = {"conv": torch.nn.Conv2d(1, 1, 2), "lstm": lstm}
    module = torch.nn.ModuleDict(modules)
    expected, *_ = run(lstm, x)
    for source in (module, module.state_dict()):
        lower, upper = from_torch(source, return_sequences=True)
        assert_close([numpy(upper(lower(x)))], [expected])


def test_to_torch_returns_arrays_that_torch_can_read(torch, rng):
    # Keras on torch cannot draw orthogonal matrices in bfloat16.
    layer = from_torch(state_dict(rng), dtype="bfloat16", recurrent_initializer="zeros")
    weight = to_torch(layer)["weight_hh_l0"]
    W_hf = numpy(ops.cast(layer.cell.W_hf, "float32"))
    np.testing.assert_array_equal(torch.tensor(weight)[UNITS : 2 * UNITS].T, W_hf)


def without(*names):
    return lambda w: {key: value for key, value in w.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: "weights.pt", "must be a `torch.nn.LSTM` or its state dict. R"),
        (lambda w: dict(enumerate(w.values())), "Received: lstm_or_state_dict=['0', "),
        (lambda w: w | {f"b.{k}": v for k, v in w.items()}, "one LSTM. Pass those"),
        (lambda w: w | {"weight_hr_l0": np.ones((2, 6))}, "'weight_hr_l0']"),
        (without("bias_hh_l0"), "=['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0']"),
        (
            lambda w: {k: v[: 3 * UNITS] for k, v in w.items()},  # of a GRU
            "`weight_ih_l*` must be of shape (24, 4), for 6 units and 4 features. Rec",
        ),
    ],
)
def test_other_weights_raise_an_error(rng, change, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        from_torch(change(state_dict(rng)))
    assert len(str(error.value)) < 400


def test_other_modules_raise_an_error(torch):
    for module in (
        torch.nn.GRU(FEATURES, UNITS),
        torch.nn.LSTM(FEATURES, UNITS, proj_size=2),
        torch.nn.Sequential(torch.nn.GRU(FEATURES, UNITS)),
    ):
        with pytest.raises(ValueError, match=r"` must be (a|of)"):
            from_torch(module)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (layers.LSTM(6), "`layer` must be a `ScratchLSTM`. Received: "),
        (ScratchLSTM(6, activation="relu"), "standard gates and activations"),
        (ScratchLSTM(6, go_backwards=True), "must have go_backwards=False"),
        (layers.Bidirectional(ScratchLSTM(6), "sum"), "must be 'concat'"),
    ],
    ids=label,
)
def test_what_torch_does_not_compute_raises_an_error(layer, message):
    layer.build((None, TIME, FEATURES))
    with pytest.raises(ValueError, match=message):
        to_torch(layer)


def test_unbuilt_layer_raises_an_error():
    with pytest.raises(ValueError, match="must be built"):
        to_torch(ScratchLSTM(6))
