"""Write model files with Keras 2 (`tf-keras`), and record its predictions.

python make_keras2.py FOLDER SEED STACKS

For each model there are `NAME.h5` and `NAME.npz` with the inputs and the outputs.
`STACKS` is the number of models of random layers.
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
warnings.simplefilter("ignore")  # Keras 2 warns that HDF5 is a legacy format

import h5py
import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import Input, Model, Sequential, layers
from tf_keras.src.saving.legacy.hdf5_format import _convert_rnn_weights

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
        layers.LSTM(5, activation="relu", return_sequences=True),
        layers.TimeDistributed(layers.Dense(FEATURES)),
    ]


def masked():
    return [
        layers.Masking(),
        layers.SimpleRNN(4, return_sequences=True, go_backwards=True),
        layers.TimeDistributed(layers.BatchNormalization()),
        layers.GRU(3, return_sequences=True),
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


SEQUENTIAL = (stock, sentiment, autoencoder, masked, cells, convolutions)
FUNCTIONAL = (video, seq2seq, bidirectional_states, nested, attention)
FUNCTIONAL += (slices, arithmetic, functions)


def random_stack(rng):
    """Random layers on sequences, of which the last has an output per sample."""

    def one_of(*choices):
        return choices[rng.integers(len(choices))]

    def recurrent(return_sequences):
        options = {
            "return_sequences": return_sequences,
            "go_backwards": bool(rng.integers(2)),
            "activation": one_of("tanh", "relu", "softsign"),
            "use_bias": bool(rng.integers(4)),
        }
        gated = {"recurrent_activation": one_of("sigmoid", "hard_sigmoid")}
        units = int(rng.integers(1, 6))
        layer = one_of(
            lambda: layers.LSTM(units, **options, **gated),
            lambda: layers.GRU(
                units, **options, **gated, reset_after=one_of(True, False)
            ),
            lambda: layers.SimpleRNN(units, **options),
        )()
        if rng.integers(2):
            return layer
        return layers.Bidirectional(layer, one_of("concat", "sum", "mul", "ave"))

    def between():
        return one_of(
            lambda: recurrent(return_sequences=True),
            lambda: layers.Conv1D(4, 2, padding="same", activation=one_of("elu", None)),
            lambda: layers.TimeDistributed(layers.Dense(3, activation="selu")),
            lambda: layers.BatchNormalization(scale=bool(rng.integers(2))),
            lambda: layers.LayerNormalization(),
            lambda: layers.Dropout(0.5),
            lambda: Sequential([layers.Dense(4), layers.BatchNormalization()]),
        )()

    stack = [between() for _ in range(rng.integers(4))]
    first = [layers.Masking()] if rng.integers(2) else []
    return [*first, *stack, recurrent(return_sequences=False), layers.Dense(2)]


def randomize(model, rng):
    for weight in model.weights:
        value = rng.normal(0, 0.5, weight.shape)
        weight.assign(np.abs(value) + 0.5 if "variance" in weight.name else value)


def save(model, name, folder, rng):
    randomize(model, rng)
    inputs = []
    for tensor in model.inputs:
        shape = [size or TIME for size in tensor.shape[1:]]
        value = rng.normal(size=[tensor.shape[0] or BATCH, *shape]).astype("float32")
        if len(shape) == 1:
            value = rng.integers(TOKENS, size=value.shape).astype("float32")
        elif len(shape) == 2:
            value[0, -2:] = 0  # masked, if the model has a mask
        inputs.append(value)
    outputs = model(inputs if len(inputs) > 1 else inputs[0])
    outputs = outputs if isinstance(outputs, list) else [outputs]
    arrays = {f"x{k}": value for k, value in enumerate(inputs)}
    arrays |= {f"y{k}": value for k, value in enumerate(outputs)}
    np.savez(folder / f"{name}.npz", **arrays)
    model.save(folder / f"{name}.h5")


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


def main(folder, seed, stacks):
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
    for k in range(int(stacks)):
        stack = [Input((TIME, FEATURES)), *random_stack(rng)]
        save(Sequential(stack), f"random_{k}", folder, rng)


if __name__ == "__main__":
    main(*sys.argv[1:])
