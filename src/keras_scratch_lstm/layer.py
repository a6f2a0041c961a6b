"""The LSTM layer: the cell over a whole sequence."""

import inspect
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _litert, recurrence
from keras_scratch_lstm._bidirectional import BidirectionalGuard
from keras_scratch_lstm._types import Activation, Choice, Config, Shape, Tensor
from keras_scratch_lstm._validation import invalid
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.per_gate import GATES

CELL_ARGUMENTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ScratchLSTMCell).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
}
_OPTIONS = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll")


@keras.saving.register_keras_serializable("keras_scratch_lstm")
class ScratchLSTM(BidirectionalGuard):
    """Long short-term memory layer whose weights are those of a `ScratchLSTMCell`.

    A drop-in replacement for `keras.layers.LSTM`: same arguments, and the same outputs
    for the same seeds. `layer.cell` has the weights, one per matrix of the equations.

    The layer runs a fast implementation: a loop with a hand-written backward pass on
    TensorFlow and JAX, `torch.lstm` on torch, and cuDNN on a GPU on TensorFlow and
    torch. Where these do not apply (custom gates, other activations, recurrent dropout
    in training, `unroll`), it runs the reference loop of `keras.layers.RNN`. After a
    call, `layer.recurrence` is the implementation used: `"tensorflow"`, `"jax"`,
    `"torch"`, `"cudnn"` or `"loop"`.
    Within the context `keras_scratch_lstm.recurrence.force("loop")`, all layers run the
    reference loop, for transformations that the fast ones do not support, such as
    `jax.linearize`.

    Args:
        units: Positive integer, size of `h` and `c`. Omit it if `cell` is given.
        activation: See `ScratchLSTMCell`, as for all arguments up to `seed` but for
            `activity_regularizer`.
        activity_regularizer: Regularizer of the output. Default: `None`.
        return_sequences: Boolean, whether to return `h` of all time steps rather than
            of the last one. Default: `False`.
        return_state: Boolean, whether to also return the last `h` and `c`. Default:
            `False`.
        go_backwards: Boolean, whether to process the time steps in reverse order; the
            output is in that order. Default: `False`.
        stateful: Boolean, whether each call starts from the states in which the
            previous call ended. Requires a fixed batch size. The states are in
            `layer.states`; they are not weights. Default: `False`.
        unroll: Boolean, whether to unroll the loop. Default: `False`.
        use_cudnn: `True`, `False` or `"auto"`, whether to use cuDNN on a GPU. `True`
            raises an error if cuDNN cannot be used, as on JAX. Default: `"auto"`.
        time_major: Boolean. If `True`, inputs, masks and returned sequences have the
            shape `(time, batch, ...)`. Default: `False`.
        cell: A `ScratchLSTMCell`, or an instance of a subclass, in place of the
            arguments from `units` to `seed`. Default: `None`.
        **kwargs: Keyword arguments of `keras.layers.RNN`. `implementation` is
            accepted for compatibility and ignored.

    Call arguments:
        sequences: Tensor of shape `(batch, time, features)`.
        initial_state: List `[h, c]` of two tensors of shape `(batch, units)`.
            Default: zeros, or the last states if `stateful`.
        mask: Boolean tensor of shape `(batch, time)`. A masked time step leaves the
            states unchanged, and repeats the previous output. Default: `None`.
        training: Boolean, whether to apply dropout. Default: `False`.

    Returns:
        The last `h`, of shape `(batch, units)`, or if `return_sequences` all `h`, of
        shape `(batch, time, units)`. If `return_state`, a list of that, the last `h`
        and the last `c`.

    Raises:
        ValueError: If an argument or an input is invalid.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import ScratchLSTM
    >>> x = np.ones((32, 10, 8), "float32")
    >>> layer = ScratchLSTM(4, return_sequences=True, return_state=True)
    >>> outputs, h, c = layer(x)
    >>> outputs.shape == (32, 10, 4) and h.shape == c.shape == (32, 4)
    True
    >>> layer.cell.W_hf.shape == (4, 4)
    True

    References:

    - [Hochreiter and Schmidhuber, 1997](https://doi.org/10.1162/neco.1997.9.8.1735)
    - [Werbos, 1990](https://doi.org/10.1109/5.58337), backpropagation through time
    """

    def __init__(
        self,
        units: int | None = None,
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
        activity_regularizer: Choice = None,
        kernel_constraint: Choice = None,
        recurrent_constraint: Choice = None,
        bias_constraint: Choice = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        seed: int | None = None,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        use_cudnn: bool | Literal["auto"] = "auto",
        time_major: bool = False,
        cell: ScratchLSTMCell | None = None,
        **kwargs: Any,
    ) -> None:
        given, created_cell = locals(), cell is None
        cell_arguments = {name: given[name] for name in CELL_ARGUMENTS}
        options = {name: given[name] for name in _OPTIONS}
        kwargs.pop("implementation", None)
        if use_cudnn not in (True, False, "auto"):
            raise invalid("use_cudnn", use_cudnn, "True, False or 'auto'")
        if cell is None:
            policy = {k: kwargs[k] for k in ("dtype", "trainable") if k in kwargs}
            cell = ScratchLSTMCell(**cell_arguments, name="lstm_cell", **policy)
        else:
            _check_cell(cell, cell_arguments)
        super().__init__(
            cell, activity_regularizer=activity_regularizer, **options, **kwargs
        )
        self.supports_masking = True
        self.input_spec = keras.InputSpec(ndim=3)
        self.time_major = time_major
        self.use_cudnn = use_cudnn
        self._created_cell = created_cell
        self.recurrence: str | None = None
        if cell.is_standard and cell.use_bias and not unroll:
            # XLA cannot compile cuDNN kernels in a TensorFlow graph.
            self.supports_jit = recurrence.supports_jit(use_cudnn)

    # The arguments of the cell.
    units = property(attrgetter("cell.units"))
    activation = property(attrgetter("cell.activation"))
    recurrent_activation = property(attrgetter("cell.recurrent_activation"))
    use_bias = property(attrgetter("cell.use_bias"))
    unit_forget_bias = property(attrgetter("cell.unit_forget_bias"))
    kernel_initializer = property(attrgetter("cell.kernel_initializer"))
    recurrent_initializer = property(attrgetter("cell.recurrent_initializer"))
    bias_initializer = property(attrgetter("cell.bias_initializer"))
    kernel_regularizer = property(attrgetter("cell.kernel_regularizer"))
    recurrent_regularizer = property(attrgetter("cell.recurrent_regularizer"))
    bias_regularizer = property(attrgetter("cell.bias_regularizer"))
    kernel_constraint = property(attrgetter("cell.kernel_constraint"))
    recurrent_constraint = property(attrgetter("cell.recurrent_constraint"))
    bias_constraint = property(attrgetter("cell.bias_constraint"))
    dropout = property(attrgetter("cell.dropout"))
    recurrent_dropout = property(attrgetter("cell.recurrent_dropout"))
    seed = property(attrgetter("cell.seed"))

    @property
    def variables(self) -> list[Any]:
        """The weights, the random seeds, and the states of a stateful layer."""
        # Keras leaves the states out, and then `fit` on JAX does not update them.
        return [*super().variables, *(self.states or [])]

    def build(self, input_shape: Shape) -> None:
        # Keras 3.16 exports no ONNX of free time if this argument is `sequences_shape`.
        batch_size, _, features = input_shape = self._batch_major(input_shape)
        if self.stateful and self.states is None and batch_size is not None:
            # Keras would give both the same path. Not tracked, as they are not weights.
            self.__dict__["states"] = [
                keras.Variable(
                    state,
                    dtype=self.variable_dtype,
                    trainable=False,
                    autocast=False,
                    name=f"state_{k}",
                )
                for k, state in enumerate(self.get_initial_state(batch_size))
            ]
        super().build(input_shape)
        self.input_spec = keras.InputSpec(shape=(None, None, features))

    def call(
        self,
        sequences: Tensor,
        initial_state: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        training: bool = False,
    ) -> Any:
        sequences = ops.convert_to_tensor(sequences)  # on the device of the weights
        # An earlier call may have ended in an error and left its masks.
        self.cell.reset_dropout_mask()
        self.cell.reset_recurrent_dropout_mask()
        if isinstance(mask, (list, tuple)):  # Keras adds those of the states
            mask = mask[0] if mask else None
        if mask is not None:
            mask = ops.convert_to_tensor(mask)
            _check_shape("mask", mask.shape, sequences.shape[:2])
        if self.time_major:
            sequences = ops.swapaxes(sequences, 0, 1)
            mask = None if mask is None else ops.swapaxes(mask, 0, 1)
        self._check_sequences(sequences)
        if initial_state is not None:
            self._check_initial_state(initial_state, sequences.shape[0])
        elif self.stateful:
            initial_state = recurrence.copies(self.states)
        result = super().call(sequences, initial_state, mask, training)
        if not (self.time_major and self.return_sequences):
            return result
        if not self.return_state:
            return ops.swapaxes(result, 0, 1)
        outputs, *states = result
        return ops.swapaxes(outputs, 0, 1), *states

    def inner_loop(
        self,
        sequences: Tensor,
        initial_state: Sequence[Tensor],
        mask: Tensor | None,
        training: bool = False,
    ) -> Any:
        if recurrence.forced() == "litert" and not self.unroll:
            _litert.check(self, sequences, initial_state, mask, training)
        cell, implementations = self.cell, {}
        drops_h = training and cell.recurrent_dropout
        if cell.is_standard and not drops_h and not self.unroll:
            implementations = recurrence.implementations(self.use_cudnn)
        for name, lstm in implementations.items():
            try:
                result = self._run(lstm, sequences, initial_state, mask, training)
            except NotImplementedError:
                continue
            self.recurrence = name
            return result
        if self.use_cudnn is True:
            raise ValueError(
                "`use_cudnn` must be 'auto' or False where cuDNN cannot run this layer "
                f"with these inputs. Received: `{self.name}` with use_cudnn=True"
            )
        self.recurrence = "loop"
        sequences = cell.prepare_sequences(sequences, training)
        last, outputs, states = super().inner_loop(
            sequences, initial_state, mask, training
        )
        returns_h = type(cell).call is ScratchLSTMCell.call
        done = returns_h or self.unroll or self.zero_output_for_mask
        if mask is not None and not done:
            mask = ops.flip(mask, 1) if self.go_backwards else mask
            outputs = recurrence.repeat_masked_outputs(outputs, mask)
            last = outputs[:, -1]
        return last, outputs, states

    def _run(self, lstm, sequences, initial_state, mask, training):
        cell = self.cell
        if training and 0 < cell.dropout < 1:
            dropout_mask = cell.get_dropout_mask(sequences[:, 0, :])
            sequences = sequences * ops.expand_dims(dropout_mask, 1)
        x = ops.swapaxes(ops.cast(sequences, cell.compute_dtype), 0, 1)
        if mask is not None:
            mask = ops.swapaxes(ops.cast(mask, "bool"), 0, 1)
        if self.go_backwards:
            x = ops.flip(x, 0)
            mask = None if mask is None else ops.flip(mask, 0)

        def cast(weights):
            return [ops.cast(weight, cell.compute_dtype) for weight in weights]

        W_x = cast(getattr(cell, "W_x" + gate) for gate in GATES)
        W_h = cast(cell._recurrent_weights(training))
        b = (
            cast(getattr(cell, "b_" + gate) for gate in GATES)
            if cell.use_bias
            else None
        )
        h_all, h, c = lstm(x, *initial_state, W_x, W_h, b, mask, training)
        if mask is not None and self.zero_output_for_mask:
            h_all = h_all * ops.cast(mask, h_all.dtype)[:, :, None]
        return h_all[-1], ops.swapaxes(h_all, 0, 1), [h, c]

    def compute_output_shape(self, input_shape: Shape) -> Any:
        shape = super().compute_output_shape(self._batch_major(input_shape))
        if not self.return_sequences:
            return shape
        if not self.return_state:
            return self._batch_major(shape)
        outputs_shape, *states_shape = shape
        return self._batch_major(outputs_shape), *states_shape

    def set_weights(self, weights: Sequence[Tensor]) -> None:
        self.cell.set_weights(weights)

    def get_config(self) -> Config:
        config = super().get_config()
        cell = config.pop("cell")
        if self._created_cell:
            cell_config = self.cell.get_config()
            config |= {name: cell_config[name] for name in CELL_ARGUMENTS}
        else:
            config["cell"] = cell
        return {
            **config,
            "activity_regularizer": keras.regularizers.serialize(
                self.activity_regularizer
            ),
            "time_major": self.time_major,
            "use_cudnn": self.use_cudnn,
        }

    @classmethod
    def from_config(cls, config: Config) -> "ScratchLSTM":
        config = dict(config)
        if isinstance(config.get("cell"), dict):
            config["cell"] = keras.saving.deserialize_keras_object(config["cell"])
        return cls(**config)

    def _batch_major(self, shape):
        """Swaps the first two axes of a shape if the layer is time-major."""
        if not self.time_major:
            return tuple(shape)
        time, batch, *rest = shape
        return (batch, time, *rest)

    def _check_sequences(self, sequences):
        batch_size, time, _ = sequences.shape
        if time == 0:
            raise ValueError(
                "`sequences` must have at least one time step. Received: shape "
                f"{tuple(sequences.shape)}"
            )
        expected = self.states[0].shape[0] if self.stateful else None
        if None not in (batch_size, expected) and batch_size != expected:
            raise ValueError(
                f"`sequences` must have the batch size {expected}, since "
                f"`{self.name}` is stateful. Received: batch size {batch_size}"
            )

    def _check_initial_state(self, initial_state, batch_size):
        states = keras.tree.flatten(initial_state)
        if len(states) != 2:
            raise ValueError(
                f"`initial_state` must be a list of 2 tensors. Received: {len(states)}"
            )
        for state, size in zip(states, self.state_size, strict=True):
            _check_shape("initial_state", ops.shape(state), (batch_size, size))


def _check_shape(what, shape, expected):
    """Raises unless two shapes are equal as far as they are known."""
    known = [
        have == want
        for have, want in zip(shape, expected, strict=False)
        if isinstance(have, int) and want is not None
    ]
    if len(shape) != len(expected) or not all(known):
        raise ValueError(
            f"`{what}` must have the shape {tuple(expected)}. Received: {tuple(shape)}"
        )


def _check_cell(cell, arguments):
    if not isinstance(cell, ScratchLSTMCell):
        raise ValueError(
            "`cell` must be a `ScratchLSTMCell` or an instance of a subclass. "
            f"Received: cell={cell!r}. Use `keras.layers.RNN` for other cells."
        )
    for name, value in arguments.items():
        default = None if name == "units" else CELL_ARGUMENTS[name]
        if not np.array_equal(value, default):  # the value may be an array
            raise ValueError(
                f"`{name}` must not be passed together with `cell`. Received: "
                f"{name}={value!r}. Pass it to the cell instead."
            )
