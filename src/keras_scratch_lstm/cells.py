"""Published variants of the LSTM cell, each a small subclass of `ScratchLSTMCell`."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_scratch_lstm import _validation, recurrence
from keras_scratch_lstm._types import Config, Shape, Tensor
from keras_scratch_lstm.cell import Gates, ScratchLSTMCell
from keras_scratch_lstm.per_gate import GATES

_register = keras.saving.register_keras_serializable("keras_scratch_lstm")


@_register
class PeepholeLSTMCell(ScratchLSTMCell):
    """LSTM cell whose gates also see the cell state.

        i_t = sigmoid(x_t W_xi + h_{t-1} W_hi + p_i * c_{t-1} + b_i)
        f_t = sigmoid(x_t W_xf + h_{t-1} W_hf + p_f * c_{t-1} + b_f)
        o_t = sigmoid(x_t W_xo + h_{t-1} W_ho + p_o * c_t + b_o)

    `c̃_t`, `c_t` and `h_t` are those of `ScratchLSTMCell`. The peephole weights `p_i`,
    `p_f` and `p_o`, each of shape `(units,)`, follow the other weights and start at 0,
    where the cell is the standard one.

    The arguments are those of `ScratchLSTMCell`.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import PeepholeLSTMCell, ScratchLSTM
    >>> layer = ScratchLSTM(cell=PeepholeLSTMCell(4))
    >>> layer(np.ones((32, 10, 8), "float32")).shape == (32, 4)
    True
    >>> layer.cell.p_o.shape == (4,)
    True

    References:

    - [Gers and Schmidhuber, 2000](https://doi.org/10.1109/IJCNN.2000.861302)
    """

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.p_i, self.p_f, self.p_o = (
            self.add_weight(name=f"p_{gate}", shape=(self.units,), initializer="zeros")
            for gate in "ifo"
        )

    def gates(self, x: Tensor, h: Tensor, c: Tensor) -> Gates:
        sigmoid, tanh = self.recurrent_activation, self.activation
        i = sigmoid(x @ self.W_xi + h @ self.W_hi + self.p_i * c + self.b_i)
        f = sigmoid(x @ self.W_xf + h @ self.W_hf + self.p_f * c + self.b_f)
        c_tilde = tanh(x @ self.W_xc + h @ self.W_hc + self.b_c)
        i, f, c_tilde = map(self.observe, ("i", "f", "c_tilde"), (i, f, c_tilde))
        c = self.observe("c", f * c + i * c_tilde)
        o = sigmoid(x @ self.W_xo + h @ self.W_ho + self.p_o * c + self.b_o)
        return Gates(i, f, o, c_tilde)


@_register
class CoupledLSTMCell(ScratchLSTMCell):
    """LSTM cell that forgets as much as it adds (CIFG).

        f_t = 1 - i_t

    The other equations are those of `ScratchLSTMCell`. The forget gate has no weights,
    so the cell has three quarters of the weights.

    The arguments are those of `ScratchLSTMCell`; those of the forget gate are ignored.

    Example:

    >>> from keras_scratch_lstm import CoupledLSTMCell
    >>> cell = CoupledLSTMCell(4)
    >>> cell.build((None, 8))
    >>> [weight.name for weight in cell.weights[:6]]
    ['W_xi', 'W_hi', 'b_i', 'W_xo', 'W_ho', 'b_o']

    References:

    - [Greff et al., 2017](https://doi.org/10.1109/TNNLS.2016.2582924)
    """

    _gates_with_weights = ("i", "o", "c")

    def gates(self, x: Tensor, h: Tensor, c: Tensor) -> Gates:
        sigmoid, tanh = self.recurrent_activation, self.activation
        i = self.observe("i", sigmoid(x @ self.W_xi + h @ self.W_hi + self.b_i))
        o = sigmoid(x @ self.W_xo + h @ self.W_ho + self.b_o)
        c_tilde = tanh(x @ self.W_xc + h @ self.W_hc + self.b_c)
        return Gates(i, 1 - i, o, c_tilde)


@_register
class LayerNormLSTMCell(ScratchLSTMCell):
    """LSTM cell with layer normalization.

        z_t = LN_x(x_t [W_xi, W_xf, W_xc, W_xo])
              + LN_h(h_{t-1} [W_hi, W_hf, W_hc, W_ho]) + [b_i, b_f, b_c, b_o]
        i_t, f_t, o_t = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)
        c̃_t = tanh(z_c)
        c_t = LN_c(f_t * c_{t-1} + i_t * c̃_t)
        h_t = o_t * tanh(c_t)

    The variant of TensorFlow Addons, which also keeps the normalized cell state. The
    `LN_*` are the layers `norm_x`, `norm_h` and `norm_c`, each a
    `keras.layers.LayerNormalization` with the weights `gamma` and `beta`. Those of the
    first two are fused in Keras's order i, f, c, o.

    The arguments are those of `ScratchLSTMCell`.

    Example:

    >>> from keras_scratch_lstm import LayerNormLSTMCell
    >>> cell = LayerNormLSTMCell(4)
    >>> cell.build((None, 8))
    >>> cell.norm_h.gamma.shape == (16,) and cell.norm_c.gamma.shape == (4,)
    True

    References:

    - [Ba, Kiros and Hinton, 2016](https://arxiv.org/abs/1607.06450)
    """

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        for name, gates in ("norm_x", 4), ("norm_h", 4), ("norm_c", 1):
            norm = keras.layers.LayerNormalization(name=name, dtype=self.dtype_policy)
            norm.build((None, gates * self.units))
            setattr(self, name, norm)

    def gates(self, x: Tensor, h: Tensor, c: Tensor) -> Gates:
        sigmoid, tanh = self.recurrent_activation, self.activation
        x = [x @ self.W_xi, x @ self.W_xf, x @ self.W_xc, x @ self.W_xo]
        h = [h @ self.W_hi, h @ self.W_hf, h @ self.W_hc, h @ self.W_ho]
        z = self.norm_x(ops.concatenate(x, -1)) + self.norm_h(ops.concatenate(h, -1))
        z_i, z_f, z_c, z_o = ops.split(z, 4, axis=-1)
        i = sigmoid(z_i + self.b_i)
        f = sigmoid(z_f + self.b_f)
        o = sigmoid(z_o + self.b_o)
        c_tilde = tanh(z_c + self.b_c)
        return Gates(i, f, o, c_tilde)

    def call(
        self, inputs: Tensor, states: Sequence[Tensor], training: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        h, c = states
        i, f, o, c_tilde = self._apply_gates(inputs, h, c, training)
        c = self.observe("c", self.norm_c(f * c + i * c_tilde))
        h = self.observe("h", o * self.activation(c))
        return h, [h, c]


@_register
class ZoneoutLSTMCell(ScratchLSTMCell):
    """LSTM cell with zoneout: units that randomly keep their previous states.

        ĉ_t, ĥ_t = the states of `ScratchLSTMCell`
        c_t = d_c * c_{t-1} + (1 - d_c) * ĉ_t
        h_t = d_h * h_{t-1} + (1 - d_h) * ĥ_t

    In training, the `d_*` are random masks, new ones at each time step, which are 1
    with the probability of the rate. In inference, they are the rate.

    Train it in a `ScratchLSTM`, which has the cell draw the masks of all time steps
    before its loop. `keras.layers.RNN` runs it in inference only.

    Args:
        *args: Arguments of `ScratchLSTMCell`.
        zoneout_c: Float in `[0, 1]`, rate for the cell state. Default: 0.5.
        zoneout_h: Float in `[0, 1]`, rate for the hidden state. Default: 0.05.
        **kwargs: Keyword arguments of `ScratchLSTMCell`.

    Raises:
        ValueError: If it is called in training without a `ScratchLSTM`.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import ScratchLSTM, ZoneoutLSTMCell
    >>> layer = ScratchLSTM(cell=ZoneoutLSTMCell(4, zoneout_c=0.2))
    >>> layer(np.ones((32, 10, 8), "float32"), training=True).shape == (32, 4)
    True

    References:

    - [Krueger et al., 2017](https://arxiv.org/abs/1606.01305)
    """

    def __init__(
        self, *args: Any, zoneout_c: float = 0.5, zoneout_h: float = 0.05, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.zoneout_c = _validation.fraction("zoneout_c", zoneout_c)
        self.zoneout_h = _validation.fraction("zoneout_h", zoneout_h)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.input_spec = keras.InputSpec(ndim=2)  # with masks or without

    def prepare_sequences(self, sequences: Tensor, training: bool = False) -> Tensor:
        if not training:
            return sequences
        shape = (*ops.shape(sequences)[:2], self.units)
        rates = self.zoneout_h, self.zoneout_c
        masks = [
            recurrence.random_uniform(shape, self.seed_generator) < d for d in rates
        ]
        masks = [ops.cast(mask, sequences.dtype) for mask in masks]
        return ops.concatenate([sequences, *masks], -1)

    def call(
        self, inputs: Tensor, states: Sequence[Tensor], training: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        h, c = states
        d_h, d_c = self.zoneout_h, self.zoneout_c
        if training:
            inputs, d_h, d_c = self._split_masks(inputs)
        i, f, o, c_tilde = self._apply_gates(inputs, h, c, training)
        new_c = f * c + i * c_tilde
        new_h = o * self.activation(new_c)
        h = self.observe("h", d_h * h + (1 - d_h) * new_h)
        c = self.observe("c", d_c * c + (1 - d_c) * new_c)
        return h, [h, c]

    def _split_masks(self, inputs):
        features, units = self.W_xi.shape
        if inputs.shape[-1] != features + 2 * units:
            raise ValueError(
                f"`{type(self).__name__}` must be in a `ScratchLSTM` in training, "
                "which draws its masks. Received: inputs without masks. Use "
                "`ScratchLSTM(cell=...)` in place of `keras.layers.RNN`."
            )
        d_h, d_c = inputs[:, features:-units], inputs[:, -units:]
        return inputs[:, :features], d_h, d_c

    def get_config(self) -> Config:
        rates = {"zoneout_c": self.zoneout_c, "zoneout_h": self.zoneout_h}
        return {**super().get_config(), **rates}


@_register
class DropConnectLSTMCell(ScratchLSTMCell):
    """LSTM cell with DropConnect on the recurrent weights, as in the AWD-LSTM.

        W_h* -> m_* * W_h* / (1 - rate)

    In training, the `m_*` are random masks, which are 0 with the probability of the
    rate, one per weight and sequence. In inference, the cell is a `ScratchLSTMCell`.
    A `ScratchLSTM` with this cell runs its fast implementation in training, too.

    Args:
        *args: Arguments of `ScratchLSTMCell`.
        drop_connect: Float in `[0, 1]`, fraction of each `W_h*` to drop in training.
            Like `dropout`, 1 drops nothing. Default: 0.5.
        **kwargs: Keyword arguments of `ScratchLSTMCell`.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import DropConnectLSTMCell, ScratchLSTM
    >>> layer = ScratchLSTM(cell=DropConnectLSTMCell(4, drop_connect=0.2))
    >>> layer(np.ones((32, 10, 8), "float32"), training=True).shape == (32, 4)
    True

    References:

    - [Wan et al., 2013](https://proceedings.mlr.press/v28/wan13.html), DropConnect
    - [Merity, Keskar and Socher, 2018](https://arxiv.org/abs/1708.02182), AWD-LSTM
    """

    def __init__(self, *args: Any, drop_connect: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_connect = _validation.fraction("drop_connect", drop_connect)
        self._weight_masks: Any = None
        self._in_training = False

    def get_dropout_mask(self, step_input: Tensor) -> Tensor:
        """Also draw the masks of the weights; `RNN` calls this before its loop."""
        if self._weight_masks is None and 0 < self.drop_connect < 1:
            shape, keep = (self.units, self.units), 1 - self.drop_connect
            random = [
                recurrence.random_uniform(shape, self.seed_generator) for _ in GATES
            ]
            self._weight_masks = [ops.cast(r < keep, r.dtype) / keep for r in random]
        return super().get_dropout_mask(step_input)

    def reset_dropout_mask(self) -> None:
        super().reset_dropout_mask()
        self._weight_masks = None

    def gates(self, x: Tensor, h: Tensor, c: Tensor) -> Gates:
        sigmoid, tanh = self.recurrent_activation, self.activation
        W_hi, W_hf, W_ho, W_hc = self._recurrent_weights(self._in_training)
        i = sigmoid(x @ self.W_xi + h @ W_hi + self.b_i)
        f = sigmoid(x @ self.W_xf + h @ W_hf + self.b_f)
        o = sigmoid(x @ self.W_xo + h @ W_ho + self.b_o)
        c_tilde = tanh(x @ self.W_xc + h @ W_hc + self.b_c)
        return Gates(i, f, o, c_tilde)

    @property
    def _has_standard_gates(self):
        return type(self).gates is DropConnectLSTMCell.gates

    def _recurrent_weights(self, training):
        weights = super()._recurrent_weights(training)
        if not (training and self._weight_masks):
            return weights
        pairs = zip(weights, self._weight_masks, strict=True)
        return [ops.cast(mask, weight.dtype) * weight for weight, mask in pairs]

    def _apply_gates(self, x, h, c, training):
        if training:
            self.get_dropout_mask(x)  # of a call of the cell alone
        self._in_training = training
        try:
            return super()._apply_gates(x, h, c, training)
        finally:
            self._in_training = False

    def get_config(self) -> Config:
        return {**super().get_config(), "drop_connect": self.drop_connect}
