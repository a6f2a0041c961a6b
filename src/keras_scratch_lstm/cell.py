"""The LSTM cell: twelve weights, six equations."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import activations, constraints, initializers, ops, regularizers

from keras_scratch_lstm import _validation, per_gate
from keras_scratch_lstm._keras import DropoutRNNCell
from keras_scratch_lstm._types import Activation, Choice, Config, Shape, Tensor
from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES


class Gates(NamedTuple):
    """What the four gates let through at one step, each `(batch, units)`."""

    i: Tensor
    f: Tensor
    o: Tensor
    c_tilde: Tensor


@keras.saving.register_keras_serializable("keras_scratch_lstm")
class ScratchLSTMCell(keras.layers.Layer, DropoutRNNCell):
    """One step of a long short-term memory, with a weight for every letter.

        i_t = sigmoid(x_t W_xi + h_{t-1} W_hi + b_i)      input gate
        f_t = sigmoid(x_t W_xf + h_{t-1} W_hf + b_f)      forget gate
        o_t = sigmoid(x_t W_xo + h_{t-1} W_ho + b_o)      output gate
        c̃_t = tanh   (x_t W_xc + h_{t-1} W_hc + b_c)      candidate memory
        c_t = f_t * c_{t-1} + i_t * c̃_t                   memory
        h_t = o_t * tanh(c_t)                             hidden state

    Every weight is a variable of its own, named as above: `W_x*` has the shape
    `(features, units)`, `W_h*` `(units, units)` and `b_*` `(units,)`. Their
    order, in `cell.weights` too, is
    `[W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c]`.

    The constructor is that of `keras.layers.LSTMCell`, and so is the result:
    with the same `seed`s, the initial weights, the dropout masks and the
    outputs of the two cells are equal. In addition, every initializer,
    regularizer and constraint may be given gate by gate, as a dict with the
    keys `"i"`, `"f"`, `"o"` and `"c"`; a gate that is left out keeps the
    default.

    Override `gates` to write a cell with other gates.

    Args:
        units: Positive integer, the size of `h` and of `c`.
        activation: Activation of the candidate memory and of the output.
            Default: `"tanh"`. `None` is the identity.
        recurrent_activation: Activation of the three gates. Default:
            `"sigmoid"`. `None` is the identity.
        use_bias: Boolean. Without it, `b_i`, `b_f`, `b_o` and `b_c` are the
            number 0 and no weights. Default: `True`.
        kernel_initializer: Initializer of the `W_x*`. One initializer is drawn
            once, for the four gates side by side, as the built-in cell does;
            in a dict, each gate is drawn on its own shape. Default:
            `"glorot_uniform"`.
        recurrent_initializer: Initializer of the `W_h*`, likewise. Default:
            `"orthogonal"`.
        bias_initializer: Initializer of the `b_*`, likewise. Default:
            `"zeros"`.
        unit_forget_bias: Boolean. If true, `b_f` starts at 1, unless
            `bias_initializer` is a dict that names `"f"`. Recommended by
            Jozefowicz et al. Default: `True`.
        kernel_regularizer: Regularizer of each `W_x*`. Default: `None`.
        recurrent_regularizer: Regularizer of each `W_h*`. Default: `None`.
        bias_regularizer: Regularizer of each `b_*`. Default: `None`.
        kernel_constraint: Constraint on each `W_x*`. Default: `None`.
        recurrent_constraint: Constraint on each `W_h*`. Default: `None`.
        bias_constraint: Constraint on each `b_*`. Default: `None`.
        dropout: Float in `[0, 1]`, the fraction of the inputs to drop in
            training, by one mask for all steps. As in the built-in cell, 1
            means no dropout. Default: 0.
        recurrent_dropout: Float in `[0, 1]`, the fraction of `h` to drop in
            training, by one mask a gate for all steps; with it, `dropout` too
            has one mask a gate. Default: 0.
        seed: Integer, the random seed of the dropout masks. Default: `None`.

    Call arguments:
        inputs: Tensor of shape `(batch, features)`.
        states: List of two tensors of shape `(batch, units)`, `[h, c]`.
        training: Boolean, whether to drop out. Default: `False`.

    Returns:
        `(h, [h, c])`, the output and the new states, each `(batch, units)`.

    Raises:
        ValueError: An argument or an input does not fit; the message names it.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import ScratchLSTMCell
    >>> rnn = keras.layers.RNN(ScratchLSTMCell(4))
    >>> rnn(np.ones((32, 10, 8), "float32")).shape == (32, 4)
    True
    >>> [weight.name for weight in rnn.cell.weights[:3]]
    ['W_xi', 'W_hi', 'b_i']

    Reference:

    - [Hochreiter and Schmidhuber, 1997](
        https://doi.org/10.1162/neco.1997.9.8.1735)
    - [Gers, Schmidhuber and Cummins, 2000](
        https://doi.org/10.1162/089976600300015015), the forget gate
    - [Jozefowicz, Zaremba and Sutskever, 2015](
        https://proceedings.mlr.press/v37/jozefowicz15.html), its bias
    - [Zhang, Lipton, Li and Smola, 2023](
        https://d2l.ai/chapter_recurrent-modern/lstm.html), the letters
    """

    def gates(self, x: Tensor, h: Tensor, c: Tensor) -> Gates:
        """The gates of one step, from its input and the step before.

        Args:
            x: Tensor of shape `(batch, features)`.
            h: Tensor of shape `(batch, units)`, the last hidden state.
            c: Tensor of shape `(batch, units)`, the last memory. Here no gate
                looks at it; in a peephole cell they do.

        Returns:
            `Gates(i, f, o, c_tilde)`, each of shape `(batch, units)`.

        Example:

        >>> import numpy as np
        >>> from keras_scratch_lstm import ScratchLSTM, ScratchLSTMCell
        >>> class CoupledCell(ScratchLSTMCell):
        ...     def gates(self, x, h, c):
        ...         gates = super().gates(x, h, c)
        ...         return gates._replace(f=1 - gates.i)
        >>> layer = ScratchLSTM(cell=CoupledCell(4))
        >>> layer(np.ones((2, 5, 3), "float32")).shape == (2, 4)
        True
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
        h, c = self._check_states(states, inputs)
        gates = self._gates_with_dropout if training else self.gates
        i, f, o, c_tilde = gates(inputs, h, c)
        c = f * c + i * c_tilde
        h = o * self.activation(c)
        return h, [h, c]

    def build(self, input_shape: Shape) -> None:
        features, units = self._check_input_shape(input_shape), self.units
        W_x = per_gate.split_initializer(self.kernel_initializer, units)
        W_h = per_gate.split_initializer(self.recurrent_initializer, units)
        b = per_gate.split_initializer(
            self.bias_initializer, units, forget_bias=self.unit_forget_bias
        )
        for gate in GATES:
            self._add_weight("W_x", gate, (features, units), W_x, "kernel")
            self._add_weight("W_h", gate, (units, units), W_h, "recurrent")
            if self.use_bias:
                self._add_weight("b_", gate, (units,), b, "bias")
            else:
                setattr(self, f"b_{gate}", 0.0)
        self.input_spec = keras.InputSpec(ndim=2, axes={-1: features})
        self.built = True

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
        units = _validation.positive_integer("units", units)
        use_bias = _validation.flag("use_bias", use_bias)
        unit_forget_bias = _validation.flag("unit_forget_bias", unit_forget_bias)
        dropout = _validation.fraction("dropout", dropout)
        recurrent_dropout = _validation.fraction("recurrent_dropout", recurrent_dropout)
        seed = _validation.integer_or_none("seed", seed, low=0, high=2**32 - 1)
        _validation.float_dtype(kwargs.get("dtype"))
        super().__init__(**kwargs)
        self.units = units
        self.activation = _activation("activation", activation)
        self.recurrent_activation = _activation(
            "recurrent_activation", recurrent_activation
        )
        self.use_bias = use_bias

        def resolve(argument, value, get, default=None):
            setattr(self, argument, per_gate.resolve(argument, value, get, default))

        # The seeds of the initializers are drawn in the built-in cell's order.
        resolve(
            "kernel_initializer", kernel_initializer, initializers.get, "glorot_uniform"
        )
        resolve(
            "recurrent_initializer",
            recurrent_initializer,
            initializers.get,
            "orthogonal",
        )
        if unit_forget_bias and per_gate.is_per_gate(bias_initializer):
            bias_initializer = {"f": "ones", **bias_initializer}
        resolve("bias_initializer", bias_initializer, initializers.get, "zeros")
        self.unit_forget_bias = unit_forget_bias

        resolve("kernel_regularizer", kernel_regularizer, regularizers.get)
        resolve("recurrent_regularizer", recurrent_regularizer, regularizers.get)
        resolve("bias_regularizer", bias_regularizer, regularizers.get)

        resolve("kernel_constraint", kernel_constraint, constraints.get)
        resolve("recurrent_constraint", recurrent_constraint, constraints.get)
        resolve("bias_constraint", bias_constraint, constraints.get)

        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        if recurrent_dropout:
            self.dropout_mask_count = len(GATES)  # for DropoutRNNCell
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

        self.state_size = [units, units]
        self.output_size = units

    def _add_weight(self, letter, gate, shape, initializer, argument):
        name = letter + gate
        weight = self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer[gate],
            regularizer=per_gate.pick(getattr(self, f"{argument}_regularizer"), gate),
            constraint=per_gate.pick(getattr(self, f"{argument}_constraint"), gate),
        )
        setattr(self, name, weight)

    def _gates_with_dropout(self, x, h, c):
        """`gates`, with the masks that all steps of a sequence share."""
        drop_x = 0 < self.dropout < 1
        drop_h = 0 < self.recurrent_dropout < 1
        if not self.recurrent_dropout:
            return self.gates(x * self.get_dropout_mask(x) if drop_x else x, h, c)

        # Each gate has masks of its own, so each is taken from a pass of its
        # own; a compiled graph computes only the gate that is taken.
        def gates_seen_by(gate):
            k = FUSED_ORDER.index(gate)
            x_gate = x * self.get_dropout_mask(x)[k] if drop_x else x
            h_gate = h * self.get_recurrent_dropout_mask(h)[k] if drop_h else h
            return Gates(*self.gates(x_gate, h_gate, c))

        return Gates(
            gates_seen_by("i").i,
            gates_seen_by("f").f,
            gates_seen_by("o").o,
            gates_seen_by("c").c_tilde,
        )

    def get_initial_state(
        self, batch_size: int | None = None, dtype: str | None = None
    ) -> list[Tensor]:
        """What a sequence begins with, where nothing else is given.

        Args:
            batch_size: Integer.
            dtype: String. Default: `None`, that in which the cell computes.

        Returns:
            List `[h, c]` of zeros, each of shape `(batch_size, units)`.
        """
        # Within a graph it may be a tensor, or what a backend has for an open size.
        is_none = batch_size is None or isinstance(batch_size, (str, float))
        if is_none or (isinstance(batch_size, int) and batch_size < 0):
            raise _validation.invalid("batch_size", batch_size, "an integer")
        dtype = keras.backend.standardize_dtype(dtype or self.compute_dtype)
        return [ops.zeros((batch_size, size), dtype=dtype) for size in self.state_size]

    def get_config(self) -> Config:
        def serialize(argument, serialize_one):
            value = getattr(self, argument)
            return {argument: per_gate.serialize(value, serialize_one)}

        return {
            **super().get_config(),
            "units": self.units,
            "activation": activations.serialize(self.activation),
            "recurrent_activation": activations.serialize(self.recurrent_activation),
            "use_bias": self.use_bias,
            **serialize("kernel_initializer", initializers.serialize),
            **serialize("recurrent_initializer", initializers.serialize),
            **serialize("bias_initializer", initializers.serialize),
            "unit_forget_bias": self.unit_forget_bias,
            **serialize("kernel_regularizer", regularizers.serialize),
            **serialize("recurrent_regularizer", regularizers.serialize),
            **serialize("bias_regularizer", regularizers.serialize),
            **serialize("kernel_constraint", constraints.serialize),
            **serialize("recurrent_constraint", constraints.serialize),
            **serialize("bias_constraint", constraints.serialize),
            "dropout": self.dropout,
            "recurrent_dropout": self.recurrent_dropout,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: Config) -> "ScratchLSTMCell":
        return cls(**_validation.config(config))

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Takes all weights, or if one of them does not fit, none.

        Args:
            weights: List of arrays in the order of `weights`, which is that of the
                book's parameters.

        Raises:
            ValueError: Their number or a shape does not fit; the message names it.
        """
        try:
            weights = list(weights)
        except TypeError:
            raise ValueError(
                f"`{self.name}` got `weights` of {type(weights)}; expected a list of "
                "arrays."
            ) from None
        self._check_weights(self.weights, len(weights), weights)
        super().set_weights(weights)

    def load_own_variables(self, store: Any) -> None:
        keys = [str(number) for number in range(len(store.keys()))]
        if set(keys) != set(store.keys()):
            raise ValueError(
                f"`{self.name}` got `weights` named {', '.join(sorted(store.keys()))}; "
                "expected them to be numbered from 0."
            )
        # Those of layers within the cell of a subclass are not in its own store.
        own = self._trainable_variables + self._non_trainable_variables
        # One at a time, since a file may say that they are large.
        self._check_weights(own, len(keys), (store[key] for key in keys))
        super().load_own_variables(store)

    def _check_weights(self, weights, number, values):
        """Refuses values that do not fit before any of them is taken."""
        if number != len(weights):
            raise ValueError(
                f"`{self.name}` got {number} `weights`; expected "
                f"{len(weights)}: {', '.join(w.name for w in weights)}."
            )
        for weight, value in zip(weights, values, strict=True):
            if not _validation.are_numbers(value):
                raise ValueError(
                    f"`{self.name}` got `weights` with {value!r} for {weight.name}; "
                    "expected an array of numbers."
                )
            if tuple(value.shape) != tuple(weight.shape):
                raise ValueError(
                    f"`{self.name}` got `weights` with {weight.name} of shape "
                    f"{tuple(value.shape)}; expected {tuple(weight.shape)}."
                )

    def _check_input_shape(self, input_shape):
        if not _validation.is_shape(input_shape, ndim=2):
            raise ValueError(
                f"`{self.name}` got `inputs` of shape {input_shape}; expected "
                "(batch, features) with known features. For a sequence of shape "
                "(batch, time, features), wrap the cell in `keras.layers.RNN`."
            )
        return input_shape[-1]

    def _check_states(self, states, inputs):
        # Not flattened: that would take longer than all the rest of the check.
        given = states if isinstance(states, (list, tuple)) else [states]
        shapes = [tuple(getattr(state, "shape", ())) for state in given]
        batch = inputs.shape[0]
        if len(shapes) != 2 or any(
            len(shape) != 2
            or shape[1] not in (None, self.units)
            or (None not in (shape[0], batch) and shape[0] != batch)
            for shape in shapes
        ):
            raise ValueError(
                f"`{self.name}` got `states` of shapes {shapes}; expected two, h and "
                f"c, each of shape (batch, {self.units}), beside `inputs` of shape "
                f"{tuple(inputs.shape)}."
            )
        return states


def _activation(argument, value):
    return _validation.interpret(
        argument, value, activations.get, "an activation, or the name of one"
    )
