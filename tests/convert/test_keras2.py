"""Files of Keras 2: those of `tf-keras`, and older dialects written by hand."""

import copy
import json

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops
from keras2_files import (
    KERAS_2_1,
    SHAPES,
    assert_predicts_as_recorded,
    predict,
    recorded,
    serialized,
    write_keras_2_1,
)
from reference import lstm

from keras_scratch_lstm import (
    load_keras2,
    load_keras2_weights,
    to_scratch,
    trace_gates,
)
from keras_scratch_lstm.convert.keras2.models import Builder

TREES = ("nested", "masked_decoders")
OPERATIONS = ("slices", "arithmetic", "functions")
MASKS = ("masked_decoders", "masked_branches")
NAMES = (
    *("stock", "sentiment", "autoencoder", "masked", "cells", "convolutions", "cudnn"),
    *("video", "seq2seq", "bidirectional_states", "nested", "attention", "stateful"),
    *("normalized", "hard", *OPERATIONS, *MASKS),
)
# What other backends compute in another way.
if keras.backend.backend() != "tensorflow":
    NAMES = ("stock", "cells", "bidirectional_states", "functions", *MASKS)
# Keras 2 removed the mask without a warning.
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not support masking")


def edited(files, name, folder, edit):
    """A copy of a file, after `edit(file, config)`."""
    path = folder / f"edited_{name}.h5"
    path.write_bytes((files / f"{name}.h5").read_bytes())
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        edit(file, config)
        file.attrs["model_config"] = json.dumps(config)
    return path


# --- files of tf-keras -------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_predictions_equal_those_of_keras2(files, name):
    model = load_keras2(files / f"{name}.h5")
    assert_predicts_as_recorded(model, files, name)
    assert not model.compiled
    modules = {type(layer).__module__.partition(".")[0] for layer in model.layers}
    assert modules == {"keras"}


@pytest.mark.usefixtures("masking_of_the_base_class")
def test_layers_pass_on_masks_as_in_keras2(files):
    assert_predicts_as_recorded(load_keras2(files / "masked.h5"), files, "masked")


# --- archives, which Keras 2 writes from 2.12 ----------------------------------

IN_ARCHIVES = [name for name in NAMES if name not in ("slices", "cudnn")]


@pytest.mark.one_backend
@pytest.mark.parametrize("name", [*IN_ARCHIVES, *(f"{name}_2_12" for name in TREES)])
def test_archives_have_the_same_weights(files, name):
    archive = load_keras2(files / f"{name}.keras")
    expected = load_keras2(files / f"{name.removesuffix('_2_12')}.h5")
    for one, other in zip(archive.weights, expected.weights, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one, other)


@pytest.mark.one_backend
def test_archive_is_recognized_by_content(files, tmp_path):
    path = tmp_path / "renamed.h5"
    path.write_bytes((files / "masked_decoders.keras").read_bytes())
    assert_predicts_as_recorded(load_keras2(path), files, "masked_decoders")


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["text", "given", "lookup"])
def test_vocabularies_are_loaded(files, tmp_path, name):
    import tensorflow as tf

    model = load_keras2(files / f"{name}.keras")
    model.save(tmp_path / "model.keras")
    arrays = np.load(files / f"{name}.npz")
    texts = tf.constant(arrays["x0"].astype(object))
    for each in (model, keras.saving.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(each(texts), arrays["y0"], atol=1e-6)


@pytest.mark.one_backend
def test_missing_vocabulary_is_an_error(files):
    with pytest.raises(ValueError, match=r"StringLookup.: its vocabulary is not in"):
        load_keras2(files / "text.json", weights=files / "text.keras")


@pytest.mark.one_backend
def test_architecture_and_weights_in_two_files(files, tmp_path):
    architecture, weights = files / "stock.json", files / "stock_weights.h5"
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(architecture.read_text()))
    for path in (architecture, twice):
        model = load_keras2(path, weights=weights)
        assert_predicts_as_recorded(model, files, "stock")
    expected = model.get_weights()
    for other in (files / "stock.weights.h5", files / "stock.keras"):
        model = load_keras2(architecture, weights=other)
        for one, value in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(one, value)
    with pytest.raises(ValueError, match=r"no weights. Pass `weights=`"):
        load_keras2(architecture)
    with pytest.raises(ValueError, match=r"no architecture. Pass the architecture as"):
        load_keras2(weights)


def test_loaded_model_can_be_saved_traced_and_converted(files, tmp_path):
    """With Keras 2's `hard_sigmoid`, which Keras 3 does not have."""
    model = load_keras2(files / "stock.h5")
    model.save(tmp_path / "model.keras")
    saved = keras.saving.load_model(tmp_path / "model.keras")
    converted = to_scratch(model)
    assert_predicts_as_recorded(saved, files, "stock")
    assert_predicts_as_recorded(converted, files, "stock")
    (x,), _ = recorded(files, "stock")
    kernel, recurrent_kernel, bias = model.layers[0].get_weights()
    trace = trace_gates(model, x, layer=0)
    z = x @ kernel + bias
    z[:, 1:] += trace.h[:, :-1] @ recurrent_kernel
    i = np.clip(0.2 * z[..., :5] + 0.5, 0, 1)
    np.testing.assert_allclose(trace.i, i, atol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["slices", "arithmetic", "masked_branches"])
def test_model_with_operations_can_be_saved_and_converted(files, tmp_path, name):
    model = load_keras2(files / f"{name}.h5")
    model.save(tmp_path / "model.keras")
    for other in (keras.saving.load_model(tmp_path / "model.keras"), to_scratch(model)):
        assert_predicts_as_recorded(other, files, name)


def test_model_with_operations_can_be_traced(files):
    (x,), (last, *_) = recorded(files, "slices")
    h = trace_gates(load_keras2(files / "slices.h5"), x).h
    np.testing.assert_allclose(h[:, -1], last, atol=1e-5)


@pytest.mark.one_backend
def test_frozen_layers_and_regularizers_are_kept(files):
    model = load_keras2(files / "nested.h5")
    encoder, *_, frozen = [part for part in model.layers if part.weights]
    assert not frozen.trainable_weights
    names = [weight.path.split("/")[-2:] for weight in encoder.non_trainable_weights]
    kinds = [kind for _, kind in names]
    assert sorted(kinds) == sorted(
        ["embeddings", "kernel", "bias"]
        + ["gamma", "beta"]
        + 2 * ["moving_mean", "moving_variance"]
    )
    lstm = load_keras2(files / "stock.h5").layers[2]
    assert isinstance(lstm.kernel_regularizer, keras.regularizers.L2)
    assert isinstance(lstm.kernel_constraint, keras.constraints.MaxNorm)


@pytest.mark.one_backend
def test_names_that_keras3_rejects_are_changed(files):
    names = [layer.name for layer in load_keras2(files / "seq2seq.h5").layers]
    assert {"a_b", "a_b_1"} < set(names)


def test_stateful_layers_keep_their_states(files):
    model = load_keras2(files / "stateful.h5")
    inputs, (expected,) = recorded(files, "stateful")
    first, second = predict(model, inputs)[0], predict(model, inputs)[0]
    assert model.layers[0].stateful
    np.testing.assert_allclose(first, expected, atol=1e-5)
    assert np.abs(second - first).max() > 1e-4


# --- older dialects ----------------------------------------------------------


def test_file_of_keras_2_1_matches_numpy(tmp_path, rng):
    path = tmp_path / "model.keras"  # HDF5, whatever its name
    kernel, recurrent_kernel, bias, W, b = write_keras_2_1(path, rng)
    w = {}
    for prefix, fused in (("W_x", kernel), ("W_h", recurrent_kernel), ("b_", bias)):
        parts = np.split(fused, 4, axis=-1)
        w |= {prefix + gate: part for gate, part in zip("ifco", parts, strict=True)}
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    _, h, _ = lstm(x, w)
    model = load_keras2(path)
    expected = np.clip(0.2 * (h @ W + b) + 0.5, 0, 1)
    np.testing.assert_allclose(predict(model, [x])[0], expected, atol=1e-5)
    assert model.layers[0].kernel_regularizer.l2 == pytest.approx(0.01)


def as_keras_2_2(file, config):
    """Functional models were a `Model`, and calls had no arguments."""
    file.attrs["keras_version"] = "2.2.4-tf"
    config["class_name"] = "Model"
    for spec in config["config"]["layers"]:
        nodes = spec["inbound_nodes"]
        spec["inbound_nodes"] = [[call[:3] for call in node] for node in nodes]


def number_calls_from_0(file, config):
    """Calls of nested models were numbered from 0 or, counting their own graph, 1."""

    def edit(value):
        for item in value if isinstance(value, list) else []:
            edit(item)
        if isinstance(value, list) and value and value[0] in models:
            value[1] -= 1

    specs = config["config"]["layers"]
    models = [spec["name"] for spec in specs if "layers" in spec["config"]]
    assert models
    edit([spec["inbound_nodes"] for spec in specs])
    edit(config["config"]["output_layers"])


def flip_kernels(file, config):
    """Theano's convolutions flip the kernel."""
    root = file["model_weights"]
    root.attrs["backend"] = "theano"
    names = ("time_distributed", "conv_lstm2d", "conv2d_transpose")
    kernels = []

    def find(path, value):
        if path.startswith(names) and getattr(value, "ndim", 0) == 4:
            kernels.append(value)

    root.visititems(find)
    assert len(kernels) == 4
    for kernel in kernels:
        kernel[...] = kernel[()][::-1, ::-1]


def use_lists(file, config):
    """Until Keras 2.2.2, the configuration of a Sequential model was a list."""
    for spec in config["config"]["layers"]:
        if "layers" in spec["config"]:
            use_lists(file, spec)
        if spec["class_name"] == "Sequential":
            first, *others = spec["config"]["layers"]
            assert first["class_name"] == "InputLayer"
            spec["config"] = others


def remove_input_layer(file, config):
    """Older models have the shape of the input in the first layer only."""
    del config["config"]["layers"][0]
    assert config["config"]["layers"][0]["config"]["batch_input_shape"]


def remove_input_shape(file, config):
    """A model built on data, of which only the weights tell the features."""
    first, second, *others = config["config"]["layers"]
    assert first["class_name"] == "InputLayer"
    config["config"] = {"layers": [second, *others]}
    second["config"].pop("batch_input_shape", None)


def store_build_shape(file, config):
    remove_input_shape(file, config)
    config["config"]["build_input_shape"] = {
        "class_name": "TensorShape",
        "items": [32, 6, 4],
    }


def store_build_shape_of_stateful(file, config):
    remove_input_shape(file, config)
    config["config"]["build_input_shape"] = [1, 1, 4]


def store_dtype_of_inputs(file, config):
    """Until Keras 2.0, the first layer had the dtype of its inputs."""
    remove_input_layer(file, config)
    config["config"]["layers"][0]["config"]["dtype"] = "int32"


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("bidirectional_states", as_keras_2_2),
        ("nested", number_calls_from_0),
        ("nested", use_lists),
        ("video", flip_kernels),
        ("stock", remove_input_shape),
        ("sentiment", remove_input_shape),
        ("autoencoder", store_build_shape),
        ("stateful", remove_input_layer),
        ("stateful", store_build_shape_of_stateful),
        ("sentiment", store_dtype_of_inputs),
    ],
)
def test_older_dialects_predict_the_same(files, tmp_path, name, edit):
    model = load_keras2(edited(files, name, tmp_path, edit))
    assert_predicts_as_recorded(model, files, name)


# --- rules -------------------------------------------------------------------


def build(class_name, **config):
    spec = {"class_name": class_name, "config": {"name": "mine", **config}}
    return Builder({}, None).layer(spec)


POLICY = serialized("Policy", name="mixed_float16")
CELL = serialized("GRUCell", units=2, implementation=1)
BACKWARD = serialized("LSTM", name="x", units=2, go_backwards=True)


AXES = {"axis": [2], "fused": None}
L1 = {"units": 2, "kernel_regularizer": serialized("L1L2", l1=0.5)}
CUSTOM = {"units": 2, "kernel_initializer": serialized("Mine")}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("class_name", "config", "attribute", "expected"),
    [
        ("LSTM", {"units": 2, "time_major": False, "implementation": 2}, "units", 2),
        ("LSTM", {"units": 2, "batch_input_shape": [None, 3, 4]}, "built", False),
        ("GRU", {"units": 2}, "cell.reset_after", False),
        ("RNN", {"cell": CELL}, "cell.reset_after", False),
        ("Bidirectional", {"layer": BACKWARD}, "forward_layer.go_backwards", True),
        ("Bidirectional", {"layer": BACKWARD}, "backward_layer.go_backwards", False),
        ("Dense", {"units": 2, "dtype": POLICY}, "dtype_policy.name", "mixed_float16"),
        ("Dense", {"units": 2, "activation": "swish"}, "activation.__name__", "silu"),
        ("ThresholdedReLU", {"theta": 0.25}, "threshold", 0.25),
        ("BatchNormalization", AXES, "axis", 2),
        ("BatchNormalizationV1", {"axis": 1}, "axis", 1),
        ("Dense", CUSTOM, "units", 2),
        ("Dense", L1, "kernel_regularizer.l1", 0.5),
    ],
)
def test_configurations_are_translated(class_name, config, attribute, expected):
    value = build(class_name, **config)
    for name in attribute.split("."):
        value = getattr(value, name)
    assert value == expected


def test_causal_attention_matches_that_of_keras3(rng):
    builder = Builder({}, None)
    tensor = serialized("InputLayer", name="x", batch_input_shape=[None, 5, 3])
    causal = serialized("Attention", name="a", causal=True, use_scale=False)
    causal["inbound_nodes"] = [[["x", 0, 0, {}], ["x", 0, 0, {}]]]
    ends = {"input_layers": [["x", 0, 0]], "output_layers": [["a", 0, 0]]}
    model = builder.model(serialized("Model", layers=[tensor, causal], **ends))
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    expected = layers.Attention()([x, x], use_causal_mask=True)
    (found,) = predict(model, [x])
    np.testing.assert_allclose(found, ops.convert_to_numpy(expected), 1e-5, 1e-6)


# --- custom objects ----------------------------------------------------------


class Scale(layers.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(), name="weight")

    def call(self, inputs):
        return inputs * self.factor * self.weight


def double(x):
    return 2 * x


LAMBDA = {"function": ["4wEAAAAAAAAA", None, None], "function_type": "lambda"}
NAMED = {"function": "double", "function_type": "function", "arguments": {}}


@pytest.mark.parametrize(
    ("spec", "custom_objects"),
    [
        (serialized("Lambda", name="code", **LAMBDA), {"code": double}),
        (serialized("Lambda", name="code", **NAMED), {"double": double}),
        (
            serialized("Activation", name="code", activation="double"),
            {"double": double},
        ),
        (serialized("Scale", name="code", factor=2), {"Scale": Scale}),
    ],
)
def test_custom_objects(tmp_path, rng, spec, custom_objects):
    config = copy.deepcopy(KERAS_2_1)
    config["config"].append(spec)
    shapes = SHAPES | ({"code": {"weight": ()}} if "Scale" in custom_objects else {})
    values = write_keras_2_1(tmp_path / "model.h5", rng, config, shapes)
    factor = 2 * values[-1] if "Scale" in custom_objects else 2
    with pytest.raises(ValueError, match=r"'code' .*Pass .*`custom_objects="):
        load_keras2(tmp_path / "model.h5")
    model = load_keras2(tmp_path / "model.h5", custom_objects)
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    *_, dense, last = predict(
        keras.Model(model.inputs[0], [layer.output for layer in model.layers]), [x]
    )
    np.testing.assert_allclose(last, factor * dense, rtol=1e-6)


# --- weights for a model that was built in Keras 3 ---------------------------


def rebuilt_stock(recurrent_activation="hard_sigmoid", units=1):
    options = {"return_sequences": True, "recurrent_activation": recurrent_activation}
    stack = [layers.LSTM(5, **options), layers.LSTM(3), layers.Dense(units)]
    return keras.Sequential([keras.Input((6, 4)), *stack])


@pytest.mark.one_backend
@pytest.mark.parametrize("extension", ["h5", "weights.h5", "keras"])
def test_weights_of_a_model_built_in_keras3(files, extension):
    model = rebuilt_stock()
    with pytest.warns(
        UserWarning, match=r"lstm.*: weights were multiplied by 1.2, since"
    ):
        load_keras2_weights(model, files / f"stock.{extension}")
    assert_predicts_as_recorded(model, files, "stock")


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["nested", "normalized"])
def test_weights_of_frozen_nested_and_normalization_layers(files, name):
    expected = load_keras2(files / f"{name}.h5")
    for extension in ("h5", "keras"):
        model = keras.models.clone_model(expected)
        load_keras2_weights(model, files / f"{name}.{extension}")
        assert_predicts_as_recorded(model, files, name)


@pytest.mark.one_backend
def test_weights_are_found_by_name(tmp_path, rng):
    values = write_keras_2_1(tmp_path / "model.h5", rng)
    x = keras.Input((5, 3))
    h = keras.Input((4,))
    parts = [layers.LSTM(4, name="lstm_1")(x), layers.Dense(2, name="dense_1")(h)]
    for model in (keras.Model([x, h], parts), keras.Model([h, x], parts[::-1])):
        load_keras2_weights(model, tmp_path / "model.h5")
        found = [
            weight
            for name in ("lstm_1", "dense_1")
            for weight in model.get_layer(name).get_weights()
        ]
        for one, other in zip(found, values, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.one_backend
@pytest.mark.parametrize("extension", ["h5", "keras"])
def test_weights_of_another_model_change_nothing(files, extension):
    path = files / f"stock.{extension}"
    model = rebuilt_stock("sigmoid", units=2)
    before = model.get_weights()
    with pytest.raises(
        ValueError, match=r"layer 'dense.*: `kernel` must have shape .3, 2."
    ):
        load_keras2_weights(model, path)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)
    small = keras.Sequential([keras.Input((6, 4)), layers.LSTM(5)])
    with pytest.raises(ValueError, match=r"1 layers with weights|no layer has the we"):
        load_keras2_weights(small, path)
    with pytest.raises(
        ValueError, match=r"`model` must be a Keras model that is built"
    ):
        load_keras2_weights(keras.Sequential([layers.LSTM(5)]), path)
