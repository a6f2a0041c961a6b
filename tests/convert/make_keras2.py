"""Write model files with Keras 2 (`tf-keras`), and record its predictions.

python make_keras2.py FOLDER SEED

For each model there are `NAME.h5`, the archive `NAME.keras`, and `NAME.npz` with the
inputs and the outputs.
"""

import collections
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.simplefilter("ignore")  # Keras 2 warns that HDF5 is a legacy format

import h5py
import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import Input, Model, Sequential, layers
from tf_keras.src.saving import saving_lib
from tf_keras.src.saving.legacy.hdf5_format import _convert_rnn_weights

DEPENDENCIES = "_layer_checkpoint_dependencies"
# Without its functions for cuDNN, Keras 2 builds its layers ten times faster.
for cls in (layers.LSTM, layers.GRU):
    cls._could_use_gpu_kernel = property(lambda _: False, lambda *_: None)

BATCH, TIME, FEATURES, TOKENS = 4, 6, 4, 7


def stock():
    return [
        layers.LSTM(5, return_sequences=True, recurrent_activation="hard_sigmoid"),
        layers.Dropout(0.2),
        layers.LSTM(3, kernel_regularizer="l2", kernel_constraint="max_norm"),
        layers.Dense(1, kernel_initializer="uniform"),
    ]


def sentiment():
    return [
        layers.Embedding(TOKENS, 5, mask_zero=True, input_length=TIME),
        layers.SpatialDropout1D(0.2),
        layers.Bidirectional(layers.LSTM(4, return_sequences=True)),
        layers.Bidirectional(layers.GRU(3, reset_after=False), merge_mode="sum"),
        layers.BatchNormalization(),
        layers.Dense(3, activation="softmax"),
    ]


def autoencoder():
    return [
        layers.LSTM(5, activation="relu"),
        layers.RepeatVector(TIME),
        layers.Bidirectional(
            layers.LSTM(5, "softsign", return_sequences=True), merge_mode="mul"
        ),
        layers.TimeDistributed(layers.Dense(FEATURES)),
    ]


def masked():
    return [
        layers.Masking(),
        layers.SimpleRNN(4, return_sequences=True, go_backwards=True, use_bias=False),
        layers.TimeDistributed(layers.BatchNormalization()),
        layers.Bidirectional(layers.GRU(3, return_sequences=True), merge_mode="ave"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(2, activation=layers.LeakyReLU(0.2)),
    ]


def cells():
    stacked = [layers.LSTMCell(3), layers.GRUCell(4), layers.SimpleRNNCell(2)]
    return [layers.RNN(stacked), layers.Dense(2, activation="hard_sigmoid")]


def convolutions():
    return [
        layers.ZeroPadding1D(2),
        layers.Conv1D(5, 3, padding="causal", dilation_rate=2),
        layers.LeakyReLU(0.1),
        layers.AveragePooling1D(2, padding="same"),
        layers.SeparableConv1D(4, 2),
        layers.PReLU(),
        layers.UpSampling1D(2),
        layers.Conv1DTranspose(3, 2),
        layers.LayerNormalization(),
        layers.ELU(0.5),
        layers.Cropping1D(1),
        layers.MaxPooling1D(2),
        layers.Flatten(),
        layers.ReLU(max_value=2.0, negative_slope=0.1),
        layers.Softmax(),
    ]


def video():
    inputs = Input((3, 6, 6, 2))
    frames = layers.TimeDistributed(layers.Conv2D(3, 3, activation="swish"))(inputs)
    frames = layers.TimeDistributed(layers.MaxPooling2D())(frames)
    first = layers.LSTM(4)(layers.TimeDistributed(layers.Flatten())(frames))
    frames = layers.ConvLSTM2D(2, 2, padding="same")(inputs)
    frames = layers.DepthwiseConv2D(2, activation="elu")(frames)
    frames = layers.SeparableConv2D(3, 2)(layers.UpSampling2D(2)(frames))
    frames = layers.Conv2DTranspose(2, 2, strides=2)(frames)
    return Model(
        inputs, layers.Add()([first, layers.Dense(4)(layers.Flatten()(frames))])
    )


def seq2seq():
    source, target = Input((TIME, FEATURES)), Input((None, FEATURES))
    encoder = layers.LSTM(5, return_sequences=True, return_state=True, name="encoder")
    encoded, *states = encoder(source)
    decoder = layers.LSTM(5, return_sequences=True, return_state=True)
    decoded, h, _ = decoder(target, initial_state=states)
    context = layers.Attention(use_scale=True)([decoded, encoded])
    additive = layers.AdditiveAttention()([decoded, encoded])
    heads = layers.MultiHeadAttention(2, 3)(decoded, value=encoded)
    merged = layers.Concatenate(name="a/b")([decoded, context, additive, heads])
    gru = layers.GRU(5, return_sequences=True)(merged, initial_state=h)
    return Model([source, target], [layers.Dense(2, name="a_b")(gru), *states])


def bidirectional_states():
    source, target = Input((TIME, FEATURES)), Input((TIME, FEATURES))
    lstm = layers.LSTM(3, return_state=True)
    _, *states = layers.Bidirectional(lstm)(source)
    bidirectional = layers.Bidirectional(layers.LSTM(3), merge_mode=None)
    forward, backward = bidirectional(target, initial_state=states)
    difference = layers.Subtract()([forward, backward])
    return Model([source, target], layers.Dot(-1)([difference, states[0]]))


def nested():
    """A shared model with frozen layers, in which trainable weights come first."""
    tokens = Input((TIME,))
    embedded = layers.Embedding(TOKENS, 4, trainable=False)(tokens)
    encoded = layers.Dense(4, trainable=False)(layers.BatchNormalization()(embedded))
    last = Sequential([layers.LSTM(4), layers.BatchNormalization(trainable=False)])
    encoder = Model(tokens, layers.Dense(4)(last(encoded)))
    frozen = Sequential([layers.Dense(3), layers.BatchNormalization(), layers.Dense(3)])
    one, other = Input((TIME,)), Input((TIME,))
    pair = layers.Multiply()([encoder(one), encoder(other)])
    outputs = frozen(layers.Maximum()([pair, encoder(one)]))
    frozen.trainable = False
    return Model([one, other], outputs)


def attention():
    inputs = Input((TIME, FEATURES))
    lstm = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(inputs)
    scores = layers.Flatten()(layers.Dense(1, activation="tanh")(lstm))
    scores = layers.RepeatVector(6)(layers.Activation("softmax")(scores))
    weighted = layers.Multiply()([lstm, layers.Permute([2, 1])(scores)])
    pooled = layers.GlobalMaxPooling1D()(layers.Reshape((3, 12))(weighted))
    return Model(inputs, layers.Average()([pooled, layers.GaussianNoise(1.0)(pooled)]))


def slices():
    inputs = Input((None, FEATURES))
    h = layers.LSTM(5, return_sequences=True)(inputs)
    parts = [h[:, -1], h[:, 1:5:2], h[:, -2:], h[:, :-1, 2], h[-1], h[1:3]]
    parts += [h[:, ::-1], h[:, 4:0:-2, ::-1], h[:, -2:-5:-1], h[:, :1:-3], h[::-1]]
    parts += [h[..., 0], h[..., ::-2, 1], h[0, ..., -3::-1], h[...], h[:, 9:1:-1, 1:9]]
    parts += [h[tf.newaxis], h[:, None, ::-1], h[..., None, 0, None, ::-1, None]]
    return Model(inputs, [*parts, tf.concat([h[:, -1], h[:, 0]], axis=-1)])


def arithmetic():
    """With layers that have the names of Keras 3's operations, and a mask to drop."""
    inputs = Input((TIME, FEATURES))
    h = layers.LSTM(4, return_sequences=True)(layers.Masking()(inputs))
    d = layers.Dense(4, activation="softplus", name="multiply")(h)
    array = np.linspace(1, 2, 4, dtype="float32")
    parts = [layers.Add(name="add")([h, d]), h + d, h - d, h * d, h / d, -h, d**2]
    parts += [h + 1, 1 + h, h - 0.5, 0.5 - h, 2 * h, h * 2, h / 3, 3 / d, 2**h]
    parts += [h + array, array + h, h - array, array - h, array * h, array / d]
    parts += [h * tf.constant(array), tf.constant([1, 2, 3, 4.0]) ** h, h @ np.eye(4)]
    weights = tf.nn.softmax(layers.Dense(1, activation="tanh")(h), axis=1)
    context = tf.reduce_sum(weights * h, axis=1)
    scores = tf.matmul(h, d, transpose_b=True) / np.sqrt(4.0)
    context += tf.reduce_max(tf.nn.softmax(scores) @ d, axis=1)
    return Model(inputs, [*parts, layers.LSTM(3)(2 * h), context])


def functions():
    x = Input((TIME, FEATURES))
    h = layers.LSTM(4, return_sequences=True)(x)
    d = layers.Dense(4, activation="softplus")(h)
    parts = [f(x) for f in (tf.abs, tf.exp, tf.sigmoid, tf.sign, tf.square, tf.tanh)]
    parts += [f(x) for f in (tf.nn.relu, tf.nn.elu, tf.nn.silu, tf.nn.softplus)]
    parts += [tf.math.log(d), tf.sqrt(d), tf.nn.softmax(h), tf.clip_by_value(x, 0, 1)]
    parts += [tf.reduce_sum(h, 1), tf.reduce_mean(x, axis=[1, -1], name="mean")]
    parts += [tf.reduce_max(h, axis=-1, keepdims=True), tf.reduce_min(h, axis=1)]
    parts += [tf.maximum(0.0, x), tf.minimum(h, x), tf.matmul(h, d, transpose_a=True)]
    parts += [
        tf.expand_dims(h, -1),
        tf.squeeze(h[:, -1:], axis=1),
        tf.squeeze(h[:, :1]),
    ]
    parts += [tf.reshape(h, (-1, TIME // 2, 8)), tf.transpose(h, perm=[0, 2, 1])]
    parts += [
        tf.stack([h, tf.add(h, d)], 2),
        tf.unstack(h, axis=1)[2],
        tf.reverse(h, [1]),
    ]
    parts += [tf.stack([h], 1), tf.tile(h, [1, 2, 1])]
    parts += [tf.one_hot(tf.cast(5 * tf.sigmoid(x), "int32"), 5)]
    parts += [tf.cast(tf.reduce_mean(tf.cast(4 * x, "int32"), axis=1), "float32")]
    tests = [x > h, x >= h, x < h, x <= h, tf.equal(tf.sign(x), 1)]
    tests += [tf.not_equal(tf.nn.relu(x), 0.0)]
    return Model(x, [*parts, *(tf.cast(test, "float32") for test in tests)])


def embedded(mask_zero=True):
    """Tokens, some of them padding, and their vectors."""
    tokens = Input((TIME,))
    return tokens, layers.Embedding(TOKENS, 4, mask_zero=mask_zero)(tokens)


def masked_decoders():
    """Decoders with masks of their own and the states of encoders."""
    source, encoded = embedded()
    target, x = embedded()
    _, h, c = layers.LSTM(3, return_state=True)(encoded)
    outputs = [layers.LSTM(3)(x, initial_state=[h, c])]
    for recurrent in (layers.LSTM, layers.GRU, layers.SimpleRNN):
        states = [h, c] if recurrent is layers.LSTM else [h]
        decoded = recurrent(3, return_sequences=True)(x, initial_state=states)
        # Outputs of masked time steps are not compared: on JAX, they start from h.
        outputs.append(layers.GlobalAveragePooling1D()(decoded))
    layer = layers.Bidirectional(layers.LSTM(3, return_state=True))
    _, *states = layer(encoded)
    layer = layers.Bidirectional(layers.LSTM(3, return_sequences=True))
    # The first decoder passes its mask on to the second.
    outputs.append(layers.GRU(3)(layer(x, initial_state=states)))
    states = [layers.Concatenate()(states[k::2]) for k in (0, 1)]
    layer = layers.LSTM(6, go_backwards=True)
    return Model([source, target], [*outputs, layer(x, initial_state=states)])


def masked_branches():
    """Masks that run through layers with names of Keras 3's own operations."""
    source, x = embedded()
    target, y = embedded()
    parts = [
        layers.Concatenate(name="concatenate")([x, y]),
        layers.Dropout(0.5)(layers.Concatenate(axis=1, name="expand_dims")([x, y])),
        layers.Average(name="any")([x, y]),
        layers.Add(name="logical_and")([layers.Dense(4)(x), x * 2]),
        layers.Multiply()([layers.Rescaling(2.0)(x), y]),
        layers.Attention()([x, y]),
        layers.AdditiveAttention()([y, x]),
        layers.MultiHeadAttention(2, 3)(x, value=y),
    ]
    return Model([source, target], [layers.LSTM(2)(part) for part in parts])


def normalized():
    x = Input((TIME, FEATURES))
    y = layers.Normalization(mean=[0.5, 1, 2, 3], variance=[1, 2, 3, 4.0])(x)
    y = layers.Normalization()(layers.Normalization(axis=None, mean=1, variance=2)(y))
    return Model(x, layers.LSTM(3)(layers.Normalization(axis=(1, 2))(y)))


def hard():
    """Every use of Keras 2's hard sigmoid that Keras 3 alone can express."""
    x, recurrent = Input((TIME, FEATURES)), {"recurrent_activation": "hard_sigmoid"}
    both, only = {**recurrent, "activation": "hard_sigmoid"}, "hard_sigmoid"
    h = layers.Bidirectional(layers.LSTM(3, return_sequences=True, **recurrent))(x)
    h = layers.GRU(3, return_sequences=True, reset_after=False, **both)(h)
    h = layers.GRU(3, return_sequences=True, **both)(2 * h - 1)
    h = layers.SimpleRNN(3, return_sequences=True, activation=only)(2 * h - 1)
    h = layers.TimeDistributed(layers.Dense(4, activation=only))(2 * h - 1)
    h = layers.Activation(only)(layers.Conv1D(4, 2, activation=only)(8 * h - 4))
    h = layers.SeparableConv1D(4, 2, activation=only)(8 * h - 6)
    h = layers.DepthwiseConv1D(2, activation=only)(2 * h - 1)
    video = layers.Reshape((3, 2, 2, 1))(layers.Flatten()(h))
    video = layers.ConvLSTM2D(2, 2, **recurrent)(video)
    return Model(x, [h, layers.Dense(2, activation=only)(layers.Flatten()(video))])


SEQUENTIAL = (stock, sentiment, autoencoder, masked, cells, convolutions)
FUNCTIONAL = (video, seq2seq, bidirectional_states, nested, attention)
FUNCTIONAL += (slices, arithmetic, functions)
FUNCTIONAL += (masked_decoders, masked_branches, normalized, hard)


def randomize(model, rng):
    for weight in model.weights:
        value = rng.normal(0, 0.5, weight.shape)
        value = np.abs(value) + 0.5 if "variance" in weight.name else value
        weight.assign(np.asarray(value, weight.dtype.as_numpy_dtype))
    for layer in model.layers:
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def save(model, name, folder, rng):
    randomize(model, rng)
    inputs = []
    for tensor in model.inputs:
        shape = [size or TIME for size in tensor.shape[1:]]
        value = rng.normal(size=[tensor.shape[0] or BATCH, *shape]).astype("float32")
        if len(shape) == 1:
            value = rng.integers(TOKENS, size=value.shape).astype("float32")
            value[0, :2] = value[1, -2:] = 0  # padding on the left, and on the right
        elif len(shape) == 2:
            value[0, -2:] = 0  # masked, if the model has a mask
        inputs.append(value)
    outputs = model(inputs if len(inputs) > 1 else inputs[0])
    outputs = outputs if isinstance(outputs, list) else [outputs]
    arrays = {f"x{k}": value for k, value in enumerate(inputs)}
    arrays |= {f"y{k}": value for k, value in enumerate(outputs)}
    np.savez(folder / f"{name}.npz", **arrays)
    model.save(folder / f"{name}.h5")
    if name != "slices":  # Keras 2 has no archives of models with `...`
        model.save(folder / f"{name}.keras")


def save_text(folder):
    """Models of texts, with vocabularies in the configuration or in a file."""
    texts = tf.constant([["b a"], ["a d"], ["c"], [""]])
    vectorize = layers.TextVectorization(output_sequence_length=3)
    vectorize.adapt(["a b c b", "a b"])
    given = layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=3)
    lookup = layers.StringLookup()
    lookup.adapt([["b"], ["c"]])
    for name, first in {"text": vectorize, "given": given, "lookup": lookup}.items():
        x = Input((1,), dtype="string")
        vectors = layers.Embedding(9, 4)(first(x))
        model = Model(x, layers.LSTM(3)(vectors))
        np.savez(folder / f"{name}.npz", x0=texts.numpy().astype(str), y0=model(texts))
        model.save(folder / f"{name}.keras")
    (folder / "text.json").write_text(model.to_json())


@contextlib.contextmanager
def as_keras_2_12():
    """Save archives as Keras 2.12 did: with other attributes first, and numbers."""

    def walk(trackable):
        names = set(dir(trackable)) - (saving_lib.ATTR_SKIPLIST - {DEPENDENCIES})
        for name in sorted(name for name in names if not name.startswith("__")):
            with contextlib.suppress(Exception):
                yield name, getattr(trackable, name)

    def container(parts, weights, assets, inner_path, visited_trackables):
        parts = parts.values() if isinstance(parts, dict) else parts
        counts = collections.Counter()
        for part in filter(saving_lib._is_keras_trackable, parts):
            name = saving_lib.generic_utils.to_snake_case(type(part).__name__)
            path = f"{inner_path}/{name}" + (f"_{counts[name]}" if counts[name] else "")
            counts[name] += 1
            saving_lib._save_state(part, weights, assets, path, visited_trackables)

    with (
        mock.patch.object(saving_lib, "_walk_trackable", walk),
        mock.patch.object(saving_lib, "_save_container_state", container),
    ):
        yield


def save_for_cudnn(folder):
    """Store the LSTM and GRU of a model as `CuDNNLSTM` and `CuDNNGRU`."""
    with h5py.File(folder / "cudnn.h5", "a") as file:
        config = json.loads(file.attrs["model_config"])
        for spec in config["config"]["layers"]:
            inner = spec["config"].get("layer", spec)
            if inner["class_name"] in ("LSTM", "GRU"):
                inner["class_name"] = f"CuDNN{inner['class_name']}"
                for name in ("activation", "recurrent_activation", "implementation"):
                    del inner["config"][name]
                for name in ("dropout", "recurrent_dropout", "reset_after", "use_bias"):
                    inner["config"].pop(name, None)
            group = file["model_weights"].get(spec["config"]["name"])
            names = [] if group is None else list(group.attrs["weight_names"])
            for start in range(0, len(names), 3):
                target = type(inner["class_name"], (), {})()
                some = names[start : start + 3]
                arrays = _convert_rnn_weights(
                    target, [group[name][()] for name in some]
                )
                for name, array in zip(some, arrays, strict=True):
                    del group[name]
                    group[name] = array
        file.attrs["model_config"] = json.dumps(config)


def main(folder, seed):
    folder, rng = Path(folder), np.random.default_rng(int(seed))
    tf_keras.utils.set_random_seed(int(seed))
    for make in SEQUENTIAL:
        inputs = Input((TIME,) if make is sentiment else (TIME, FEATURES))
        save(Sequential([inputs, *make()]), make.__name__, folder, rng)
    for make in FUNCTIONAL:
        save(make(), make.__name__, folder, rng)
    stateful = layers.LSTM(3, stateful=True, batch_input_shape=(1, 1, FEATURES))
    save(Sequential([stateful, layers.Dense(2)]), "stateful", folder, rng)
    layer = layers.Bidirectional(layers.LSTM(3, return_sequences=True))
    cudnn = [layers.LSTM(5, return_sequences=True), layer, layers.GRU(4)]
    save(Sequential([Input((TIME, FEATURES)), *cudnn]), "cudnn", folder, rng)
    save_for_cudnn(folder)
    model = tf_keras.models.load_model(folder / "stock.h5")
    (folder / "stock.json").write_text(model.to_json())
    model.save_weights(folder / "stock_weights.h5")
    model.save_weights(folder / "stock.weights.h5")
    save_text(folder)
    with as_keras_2_12():
        for name in ("nested", "masked_decoders"):
            model = tf_keras.models.load_model(folder / f"{name}.h5")
            model.save(folder / f"{name}_2_12.keras")


if __name__ == "__main__":
    main(*sys.argv[1:])
