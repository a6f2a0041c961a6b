"""Translate the configurations of Keras 2 layers into arguments of Keras 3.

Each rule has one reason and changes a configuration in place.
"""

import inspect

import numpy as np
from keras import layers

from keras_scratch_lstm.convert.keras2.files import FileError

_KINDS = (
    *("Conv", "ConvLSTM", "MaxPooling", "AveragePooling", "GlobalMaxPooling"),
    *("GlobalAveragePooling", "UpSampling", "ZeroPadding", "Cropping"),
    "SpatialDropout",
)
SUPPORTED = (
    *("LSTM", "GRU", "SimpleRNN", "RNN", "LSTMCell", "GRUCell", "SimpleRNNCell"),
    *(
        "StackedRNNCells",
        "Bidirectional",
        "TimeDistributed",
        "Masking",
        "Embedding",
        "Dense",
    ),
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax"),
    *(
        "Dropout",
        "GaussianNoise",
        "GaussianDropout",
        "AlphaDropout",
        "ActivityRegularization",
    ),
    *("BatchNormalization", "LayerNormalization", "Normalization", "Rescaling"),
    *("SeparableConv1D", "SeparableConv2D", "DepthwiseConv1D", "DepthwiseConv2D"),
    *("Conv1DTranspose", "Conv2DTranspose"),
    *(f"{kind}{rank}D" for kind in _KINDS for rank in (1, 2, 3)),
    *("Flatten", "Reshape", "Permute", "RepeatVector"),
    *("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"),
    *("Concatenate", "Dot", "Attention", "AdditiveAttention", "MultiHeadAttention"),
    *("StringLookup", "TextVectorization"),
)
# The same layers under other names, in some releases.
_ALIASES = {
    "CuDNNLSTM": "LSTM",
    "UnifiedLSTM": "LSTM",
    "CuDNNGRU": "GRU",
    "UnifiedGRU": "GRU",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "ThresholdedReLU": "ReLU",
}
# As of Keras 3.16, these do not pass on the mask of their input by default.
PASSING_MASKS = (layers.RNN, layers.Bidirectional, layers.TimeDistributed)
DROPPING_MASKS = (layers.Normalization, layers.Rescaling)  # in Keras 2
_RECURRENT = (layers.RNN, layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)
_INHERITED = ("name", "dtype", "activity_regularizer")


def _remove(*names):
    """Rule for arguments that do not change what the layer computes."""

    def remove(config):
        for name in names:
            config.pop(name, None)

    return remove


def _use_dtype_name(config):
    """A dtype policy is stored with its class."""
    if isinstance(config.get("dtype"), dict):
        config["dtype"] = (config["dtype"].get("config") or {}).get("name")


def _default(name, value):
    """Rule for an argument that older configurations lack, with another default."""
    return lambda config: config.setdefault(name, value)


def _rename(old, new):
    def rename(config):
        if old in config:
            config[new] = config.pop(old)

    return rename


def _unpack_axis(config):
    """`axis` may be a list of one axis."""
    axis = config.get("axis")
    if isinstance(axis, list) and len(axis) == 1:
        config["axis"] = axis[0]


def _use_tuples(config):
    """JSON has no tuples, which some layers require."""
    for name, value in config.items():
        if isinstance(value, list) and all(isinstance(v, int) for v in value):
            config[name] = tuple(value)


def _reverse_backward_layer(config):
    """Keras 3 makes a backward layer that goes backwards, as if `layer` never did."""
    layer = config["layer"]["config"]
    if layer.get("go_backwards") and not config.get("backward_layer"):
        backward = {**layer, "go_backwards": False, "name": f"backward_{layer['name']}"}
        config["backward_layer"] = {**config["layer"], "config": backward}


def _remove_integer_dtype(config):
    """In Keras 2.0, the first layer has the dtype of its inputs."""
    if str(config.get("dtype")).startswith(("int", "uint")):
        del config["dtype"]


def _check_vocabulary(config):
    """Without one, all text would become one token; a path is not opened."""
    if not isinstance(config.get("vocabulary"), list):
        remedy = "Save the model as `.keras` with `tf-keras`, which stores it"
        raise FileError(f"its vocabulary is not in the file. {remedy}.")


def _use_scalars(config):
    """Keras would repeat one mean for all features."""
    mean, variance = config.get("mean"), config.get("variance")
    if mean is not None and np.size(mean) == np.size(variance) == 1:
        config.update(axis=None, mean=np.ravel(mean)[0], variance=np.ravel(variance)[0])
    elif mean is not None and len(np.ravel(config["axis"])) != 1:
        raise FileError("`mean` and `variance` must have one axis.")


_EVERY = (
    _remove("batch_input_shape", "input_shape", "input_dtype"),  # of `InputLayer`
    _remove("trainable"),  # set after the weights
    _use_dtype_name,
)
_RULES = {
    # Keras 2.0 has no `reset_after`.
    "GRU": (_default("reset_after", False),),
    "GRUCell": (_default("reset_after", False),),
    "CuDNNGRU": (_default("reset_after", True),),
    "Bidirectional": (_reverse_backward_layer,),
    "Embedding": (_remove("input_length"), _remove_integer_dtype),
    "Normalization": (_use_scalars,),
    **dict.fromkeys(
        ("StringLookup", "TextVectorization"),
        (_check_vocabulary, _remove("dtype", "vocabulary_size")),
    ),
    "LeakyReLU": (_rename("alpha", "negative_slope"),),
    "ThresholdedReLU": (_rename("theta", "threshold"),),
    "BatchNormalization": (_unpack_axis, _remove("fused")),
    "LayerNormalization": (_unpack_axis,),
    "Softmax": (_unpack_axis,),
    "MultiHeadAttention": (_remove("query_shape", "key_shape", "value_shape"),),
    # Stored for every convolution, but these have other kernels.
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D", "DepthwiseConv1D", "DepthwiseConv2D"),
        (_remove("kernel_initializer", "kernel_regularizer", "kernel_constraint"),),
    ),
}


def clean(config):
    """Translate what the configurations of all layers have, custom ones included."""
    for rule in _EVERY:
        rule(config)


def translate(class_name, config):
    """Translate the configuration of a layer, except for the objects in it.

    Args:
        class_name: Class of the layer in Keras 2.
        config: Its configuration, after `clean`. Changed in place.

    Returns:
        The class in Keras 3, to be called with the configuration.
    """
    name = _ALIASES.get(class_name, class_name)
    if name not in SUPPORTED:
        raise FileError(
            f"the class is not supported. Pass `custom_objects={{{class_name!r}: "
            f"...}}`, or use only {', '.join(SUPPORTED)}."
        )
    cls = getattr(layers, name)
    for rule in _RULES.get(class_name, _RULES.get(name, ())):
        rule(config)
    if issubclass(cls, _RECURRENT):
        config.pop("implementation", None)  # how to compute the same
    _remove_ungrouped(config, cls)
    _use_tuples(config)
    _remove_unused(config, cls)
    return cls


def _accepts(cls, argument):
    return argument in _INHERITED or argument in inspect.signature(cls).parameters


def _remove_ungrouped(config, cls):
    """`groups` is stored for all convolutions, also where Keras 3 has no groups."""
    if config.get("groups") == 1 and not _accepts(cls, "groups"):
        del config["groups"]


def _remove_unused(config, cls):
    """Options that Keras 3 no longer has, such as `time_major`, must be off."""
    for name in [name for name in config if not _accepts(cls, name)]:
        if config[name] not in (None, False):
            raise FileError(f"Keras 3 has no `{name}`. Received: {name}={config[name]}")
        del config[name]
