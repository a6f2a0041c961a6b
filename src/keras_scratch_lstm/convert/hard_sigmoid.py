"""The hard sigmoid of Keras 2, `clip(0.2 * x + 0.5, 0, 1)`.

That of Keras 3 has a slope of 1/6, so Keras 2's at x is Keras 3's at 1.2 * x.
"""

import keras
import numpy as np
from keras import activations, ops

from keras_scratch_lstm import _keras

SCALE = 1.2
# Whether each gate, in the order of the weights, has the recurrent activation.
_GATES = {
    "LSTMCell": (True, True, False, True),
    "ConvLSTMCell": (True, True, False, True),
    "GRUCell": (True, True, False),
}


# The name must differ from that of Keras 3's function, or Keras would save that one.
@keras.saving.register_keras_serializable("keras_scratch_lstm")
def keras2_hard_sigmoid(x):
    """The hard sigmoid of Keras 2. That of Keras 3 has a slope of 1/6, not 0.2."""
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def _is_used(layer, names=("activation", "recurrent_activation")):
    """Whether a layer or cell has the hard sigmoid of Keras 3."""
    return any(getattr(layer, k, None) is activations.hard_sigmoid for k in names)


def factors(owner):
    """The factor of each gate's weights that makes Keras 3's hard sigmoid Keras 2's."""
    is_known = type(owner).__module__.startswith("keras.")
    if not owner.weights or not is_known or not _is_used(owner):
        return None
    kind = type(owner).__name__
    is_hard = _is_used(owner, ["activation"])
    if is_hard and kind in ("LSTMCell", "ConvLSTMCell"):
        raise ValueError(
            "`activation='hard_sigmoid'`, which is also applied to the cell state, has "
            "no equivalent in Keras 3."
        )
    is_scaled = {True: _is_used(owner, ["recurrent_activation"]), False: is_hard}
    return [SCALE if is_scaled[k] else 1 for k in _GATES.get(kind, (False,))]


def scale(owner, variable, array):
    """An array of a layer's weights, multiplied by the `factors`."""
    found = factors(owner)
    if found is None or variable.name == "depthwise_kernel":  # before another kernel
        return array
    return array * np.repeat(found, array.shape[-1] // len(found))


def layers_with(model):
    """Layers and cells with the hard sigmoid of Keras 3, by their paths."""
    parts = [part for part in _keras.all_layers(model) if _is_used(part)]
    return {p.path: p for p in parts if not isinstance(p, keras.layers.RNN)}


def activation_layer(name):
    """Keras 2's `Activation("hard_sigmoid")`, which has no weights to scale."""
    stack = [keras.layers.Rescaling(SCALE), keras.layers.Activation("hard_sigmoid")]
    model = keras.Sequential(stack, name=name)
    model.supports_masking = True
    return model
