"""The LSTM cell: twelve weights, six equations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import activations, ops

from keras_scratch_lstm import _validation, per_gate
from keras_scratch_lstm._keras import DropoutRNNCell
from keras_scratch_lstm._types import Activation, Choice, Config, Shape, Tensor
from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES

_RATES = ("dropout", "recurrent_dropout")
# On torch, layers are modules, which define `__getattr__`.
_get_attribute = getattr(keras.layers.Layer, "__getattr__", object.__getattribute__)
_PLAIN = ("units", "use_bias", "unit_forget_bias", *_RATES, "seed")


class Gates(NamedTuple):
    """The gates of one time step, each of shape `(batch, units)`."""

    i: Tensor
    f: Tensor
    o: Tensor
    c_tilde: Tensor


@keras.saving.register_keras_serializable("keras_scratch_lstm")
class ScratchLSTMCell(keras.layers.Layer, DropoutRNNCell):
    """Long short-term memory cell in which every matrix is its own named weight.

        i_t = sigmoid(x_t W_xi + h_{t-1} W_hi + b_i)      input gate
        f_t = sigmoid(x_t W_xf + h_{t-1} W_hf + b_f)      forget gate
        o_t = sigmoid(x_t W_xo + h_{t-1} W_ho + b_o)      output gate
        c̃_t = tanh   (x_t W_xc + h_{t-1} W_hc + b_c)      candidate cell state
        c_t = f_t * c_{t-1} + i_t * c̃_t                   cell state
        h_t = o_t * tanh(c_t)                             hidden state

    The weights are attributes: `W_x*` of shape `(features, units)`, `W_h*` of shape
    `(units, units)` and `b_*` of shape `(units,)`. `cell.weights` has the order
    `[W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c]`.

    A drop-in replacement for `keras.layers.LSTMCell`: same constructor, and for the
    same seeds the same initial weights, dropout masks and outputs. In addition, every
    initializer, regularizer and constraint can be set per gate, by a dict with the
    keys `"i"`, `"f"`, `"o"` and `"c"`; gates that are left out keep the default.
    Override `gates` to write a custom cell, as `CoupledLSTMCell` does, with `observe`
    where one array depends on another.

    Args:
        units: Positive integer, size of `h` and `c`.
        activation: Activation of the candidate cell state and of the output.
            `None` is the identity. Default: `"tanh"`.
        recurrent_activation: Activation of the three gates. `None` is the identity.
            Default: `"sigmoid"`.
        use_bias: Boolean. If `False`, the `b_*` are the number 0, not weights.
            Default: `True`.
        kernel_initializer: Initializer of the `W_x*`. A single initializer is drawn
            once for the fused kernel, as in the built-in cell; in a dict, each gate
            is drawn on its own shape. Default: `"glorot_uniform"`.
        recurrent_initializer: Initializer of the `W_h*`, likewise. Default:
            `"orthogonal"`.
        bias_initializer: Initializer of the `b_*`, likewise. Default: `"zeros"`.
        unit_forget_bias: Boolean. If `True`, `b_f` is initialized to 1, unless
            `bias_initializer` is a dict with the key `"f"`. Default: `True`.
        kernel_regularizer: Regularizer of each `W_x*`. Default: `None`.
        recurrent_regularizer: Regularizer of each `W_h*`. Default: `None`.
        bias_regularizer: Regularizer of each `b_*`. Default: `None`.
        kernel_constraint: Constraint on each `W_x*`. Default: `None`.
        recurrent_constraint: Constraint on each `W_h*`. Default: `None`.
        bias_constraint: Constraint on each `b_*`. Default: `None`.
        dropout: Float in `[0, 1]`, fraction of the inputs to drop in training, with
            one mask for all time steps. As in the built-in cell, 1 drops nothing.
            Default: 0.
        recurrent_dropout: Float in `[0, 1]`, fraction of `h` to drop in training,
            with one mask per gate; `dropout` then has one mask per gate, too. Custom
            gates share one mask. Default: 0.
        seed: Integer, random seed of the dropout masks. Default: `None`.
        **kwargs: Keyword arguments of `keras.layers.Layer`. `implementation` is
            accepted for compatibility and ignored.

    Call arguments:
        inputs: Tensor of shape `(batch, features)`.
        states: List `[h, c]` of two tensors of shape `(batch, units)`.
        training: Boolean, whether to apply dropout. Default: `False`.

    Returns:
        `(h, [h, c])`: output and new states, each of shape `(batch, units)`.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import ScratchLSTMCell
    >>> rnn = keras.layers.RNN(ScratchLSTMCell(4))
    >>> rnn(np.ones((32, 10, 8), "float32")).shape == (32, 4)
    True
    >>> [weight.name for weight in rnn.cell.weights[:3]]
    ['W_xi', 'W_hi', 'b_i']

    References:

    - [Hochreiter and Schmidhuber, 1997](https://doi.org/10.1162/neco.1997.9.8.1735)
    - [Gers et al., 2000](https://doi.org/10.1162/089976600300015015), forget gate
    - [Jozefowicz et al., 2015](https://proceedings.mlr.press/v37/jozefowicz15.html)
    - [Zhang et al., 2023](https://d2l.ai/chapter_recurrent-modern/lstm.html), notation
    """

    _gates_with_weights: tuple[str, ...] = GATES

    def __init__(
        self,
        units: int,
        activation: Activation = "tanh",
        recurrent_activation: Activation = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Choice = "glorot_uniform",
        recurrent_initializer: Choice = "orthogonal",
        bias_initializer: Choice = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Choice = None,
        recurrent_regularizer: Choice = None,
        bias_regularizer: Choice = None,
        kernel_constraint: Choice = None,
        recurrent_constraint: Choice = None,
        bias_constraint: Choice = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("implementation", None)
        super().__init__(**kwargs)
        self.units = _validation.positive_integer("units", units)
        self.activation = activations.get(activation)
        self.recurrent_activation = activations.get(recurrent_activation)
        self.use_bias = use_bias
        self.unit_forget_bias = unit_forget_bias
        if unit_forget_bias and per_gate.is_per_gate(bias_initializer):
            bias_initializer = {"f": "ones", **bias_initializer}
        # Unseeded initializers draw their seeds here, in the built-in cell's order.
        given = locals()
        for name, (module, default) in per_gate.OPTIONS.items():
            value = per_gate.resolve(name, given[name], module.get, default)
            setattr(self, name, value)
        for name in _RATES:
            setattr(self, name, _validation.fraction(name, given[name]))
        # Custom gates may depend on one another, so they share one mask.
        if recurrent_dropout and self._has_standard_gates:
            self.dropout_mask_count = len(GATES)  # for DropoutRNNCell
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.state_size = [self.units, self.units]
        self.output_size = self.units

    def build(self, input_shape: Shape) -> None:
        features, units = input_shape[-1], self.units
        self.input_spec = keras.InputSpec(ndim=2, axes={-1: features})
        split = per_gate.split_initializer
        W_x = split(self.kernel_initializer, units)
        W_h = split(self.recurrent_initializer, units)
        b = split(self.bias_initializer, units, self.unit_forget_bias)
        for gate in self._gates_with_weights:
            self._add_weight("W_x" + gate, (features, units), W_x[gate], "kernel")
            self._add_weight("W_h" + gate, (units, units), W_h[gate], "recurrent")
            if self.use_bias:
                self._add_weight("b_" + gate, (units,), b[gate], "bias")
            else:
                setattr(self, "b_" + gate, 0.0)
        self.built = True

    def gates(self, x: Tensor, h: Tensor, c: Tensor) -> Gates:
        """Compute the gates of one time step.

        Args:
            x: Tensor of shape `(batch, features)`, the input.
            h: Tensor of shape `(batch, units)`, the previous hidden state.
            c: Tensor of shape `(batch, units)`, the previous cell state.

        Returns:
            `Gates(i, f, o, c_tilde)`, each of shape `(batch, units)`.
        """
        sigmoid, tanh = self.recurrent_activation, self.activation
        i = sigmoid(x @ self.W_xi + h @ self.W_hi + self.b_i)
        f = sigmoid(x @ self.W_xf + h @ self.W_hf + self.b_f)
        o = sigmoid(x @ self.W_xo + h @ self.W_ho + self.b_o)
        c_tilde = tanh(x @ self.W_xc + h @ self.W_hc + self.b_c)
        return Gates(i, f, o, c_tilde)

    def call(
        self, inputs: Tensor, states: Sequence[Tensor], training: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        h, c = states
        i, f, o, c_tilde = self._apply_gates(inputs, h, c, training)
        c = self.observe("c", f * c + i * c_tilde)
        h = self.observe("h", o * self.activation(c))
        return h, [h, c]

    def observe(self, name: str, value: Tensor) -> Tensor:
        """Return an array of a time step, as an experiment records or edits it.

        Outside of experiments, this returns `value`. All gates pass through it after
        `gates`. Within `gates`, pass an array through it before others are computed
        from it, so that edits and gradients include the dependence:

            i = self.observe("i", sigmoid(...))
            f = 1 - i
        """
        return value

    @property
    def is_standard(self) -> bool:
        """Whether the activations and `gates` and `call` are the standard ones."""
        return (
            self._has_standard_gates
            and type(self).call is ScratchLSTMCell.call
            and self.activation is activations.tanh
            and self.recurrent_activation is activations.sigmoid
        )

    def prepare_sequences(self, sequences: Tensor, training: bool = False) -> Tensor:
        """Return the inputs of all time steps, `(batch, time, features)`, for `call`.

        `ScratchLSTM` calls it before its loop, so that a cell can add random masks.
        """
        return sequences

    def get_initial_state(
        self, batch_size: int | None = None, dtype: Any = None
    ) -> list[Tensor]:
        """Initial states `[h, c]`: zeros of shape `(batch_size, units)`."""
        # The book's `RNNModel` passes a dtype of TensorFlow.
        dtype = keras.backend.standardize_dtype(dtype or self.compute_dtype)
        return [ops.zeros((batch_size, size), dtype=dtype) for size in self.state_size]

    def get_config(self) -> Config:
        config = super().get_config()
        for name in _PLAIN:
            config[name] = getattr(self, name)
        for name in ("activation", "recurrent_activation"):
            config[name] = activations.serialize(getattr(self, name))
        for name, (module, _) in per_gate.OPTIONS.items():
            config[name] = per_gate.serialize(getattr(self, name), module.serialize)
        return config

    def __getattr__(self, name):
        if name in per_gate.WEIGHT_NAMES and not vars(self).get("built"):
            raise AttributeError(
                f"`{name}` does not exist until `{self.name}` is built. Call the layer "
                "on data once, or `build` it."
            )
        return _get_attribute(self, name)

    @property
    def _has_standard_gates(self):
        return type(self).gates is ScratchLSTMCell.gates

    def _add_weight(self, name, shape, initializer, kind):
        gate = name[-1]
        weight = self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            regularizer=per_gate.pick(getattr(self, f"{kind}_regularizer"), gate),
            constraint=per_gate.pick(getattr(self, f"{kind}_constraint"), gate),
        )
        setattr(self, name, weight)

    def _recurrent_weights(self, training):
        """The `W_h*` of a call, for the fast implementations."""
        return [getattr(self, "W_h" + gate) for gate in GATES]

    def _apply_gates(self, x, h, c, training):
        """`gates`, with dropout in training."""
        drop_x = training and 0 < self.dropout < 1
        drop_h = training and 0 < self.recurrent_dropout < 1
        if training and hasattr(self, "dropout_mask_count"):
            # Every gate has its own masks, so each is taken from its own call. A
            # compiled graph computes only the gate that is taken.
            def call_for(gate):
                k = FUSED_ORDER.index(gate)
                x_gate = x * self.get_dropout_mask(x)[k] if drop_x else x
                h_gate = h * self.get_recurrent_dropout_mask(h)[k] if drop_h else h
                return self.gates(x_gate, h_gate, c)

            gates = [call_for(gate)[k] for k, gate in enumerate(GATES)]
        else:
            x = x * self.get_dropout_mask(x) if drop_x else x
            h = h * self.get_recurrent_dropout_mask(h) if drop_h else h
            gates = _check_gates(self.gates(x, h, c))
        return Gates(*map(self.observe, Gates._fields, gates))


def _check_gates(gates):
    is_tuple = isinstance(gates, (tuple, list))  # a tensor would unpack, too
    if is_tuple and len(gates) == len(GATES):
        return gates
    received = f"{len(gates)} values" if is_tuple else type(gates).__name__
    rule = "`gates` must return `Gates(i, f, o, c_tilde)`."
    raise ValueError(f"{rule} Received: {received}")
