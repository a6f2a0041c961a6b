"""The cell over a whole sequence."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation, recurrence
from keras_scratch_lstm._keras import keep_dtype
from keras_scratch_lstm._types import Activation, Choice, Config, Shape, Tensor
from keras_scratch_lstm.cell import ScratchLSTMCell
from keras_scratch_lstm.per_gate import GATES

_CELL_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ScratchLSTMCell).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
}
_FLAGS = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll")


def _of_the_cell(name):
    return property(lambda layer: getattr(layer.cell, name))


@keras.saving.register_keras_serializable("keras_scratch_lstm")
class ScratchLSTM(keras.layers.RNN):
    """A long short-term memory over a whole sequence, its weights by letter.

    What `keras.layers.LSTM` is to `keras.layers.LSTMCell`, this is to
    `ScratchLSTMCell`: it takes the same arguments, and with the same seeds it
    gives the same outputs. The weights are those of `layer.cell`, one for
    every letter of the equations that stand there.

    Args:
        units: Positive integer, the size of `h` and of `c`. Left out where a
            `cell` is given.
        activation: See `ScratchLSTMCell`, as for all arguments from here to
            `seed`, each of which may be by gate where it may be there.
        recurrent_activation: See `ScratchLSTMCell`.
        use_bias: See `ScratchLSTMCell`.
        kernel_initializer: See `ScratchLSTMCell`.
        recurrent_initializer: See `ScratchLSTMCell`.
        bias_initializer: See `ScratchLSTMCell`.
        unit_forget_bias: See `ScratchLSTMCell`.
        kernel_regularizer: See `ScratchLSTMCell`.
        recurrent_regularizer: See `ScratchLSTMCell`.
        bias_regularizer: See `ScratchLSTMCell`.
        activity_regularizer: Regularizer of the layer's output. Default:
            `None`.
        kernel_constraint: See `ScratchLSTMCell`.
        recurrent_constraint: See `ScratchLSTMCell`.
        bias_constraint: See `ScratchLSTMCell`.
        dropout: See `ScratchLSTMCell`.
        recurrent_dropout: See `ScratchLSTMCell`.
        seed: See `ScratchLSTMCell`.
        return_sequences: Boolean, whether to return `h` of all steps, not of
            the last one alone. Default: `False`.
        return_state: Boolean, whether to return the last `h` and `c`, too.
            Default: `False`.
        go_backwards: Boolean, whether to run from the last step to the first;
            the output then is in the order of the run. Default: `False`.
        stateful: Boolean, whether each call starts from the states in which
            the last one ended. It needs inputs of one known batch size. The
            states are in `layer.states`, and in `layer.variables`, but they
            are no weights. Default: `False`.
        unroll: Boolean, whether to write the loop out, step after step.
            Default: `False`.
        use_cudnn: `True`, `False` or `"auto"`: whether the steps run in cuDNN
            on a GPU. `True` raises an error where cuDNN can't be used.
            Default: `"auto"`.
        time_major: Boolean. If true, inputs, masks and returned sequences
            have the time first: `(time, batch, features)`. Not for within
            `keras.layers.Bidirectional`, which turns axis 1 round whatever it
            is. Default: `False`.
        cell: A cell of one's own to take the place of the arguments from
            `units` to `seed`: a `ScratchLSTMCell` or a subclass. Default:
            `None`.

    Call arguments:
        sequences: Tensor of shape `(batch, time, features)`.
        initial_state: List of two tensors of shape `(batch, units)`, `[h, c]`.
            Default: zeros, or the last states where `stateful`.
        mask: Boolean tensor of shape `(batch, time)`. A step that it marks
            `False` leaves the states as they are, and its output repeats the
            one before. Default: `None`.
        training: Boolean, whether to drop out. Default: `False`.

    Returns:
        `h` of the last step, `(batch, units)`, or with `return_sequences` of
        all steps, `(batch, time, units)`. With `return_state`, a list of that,
        the last `h` and the last `c`, each `(batch, units)`.

    Raises:
        ValueError: An argument or an input does not fit; the message names it.

    After a call, `layer.recurrence` names the way in which its steps ran: the
    fast one of the backend (`"tensorflow"`, `"jax"`, `"torch"`), `"cudnn"`, or
    `"loop"`, the plain loop over the cell. That one serves what the fast ones do
    not: other activations, overridden gates, recurrent dropout in training and
    `unroll`.

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

    Reference:

    - [Hochreiter and Schmidhuber, 1997](
        https://doi.org/10.1162/neco.1997.9.8.1735)
    - [Werbos, 1990](https://doi.org/10.1109/5.58337), the backward pass through
      time
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
        given = locals()
        cell_arguments = {name: given[name] for name in _CELL_DEFAULTS}
        if not (isinstance(use_cudnn, str) and use_cudnn == "auto"):
            use_cudnn = _validation.flag(
                "use_cudnn", use_cudnn, "True, False or 'auto'"
            )
        flags = {name: _validation.flag(name, given[name]) for name in _FLAGS}
        if "zero_output_for_mask" in kwargs:
            _validation.flag("zero_output_for_mask", kwargs["zero_output_for_mask"])
        time_major = _validation.flag("time_major", time_major)
        activity_regularizer = _validation.interpret(
            "activity_regularizer",
            activity_regularizer,
            keras.regularizers.get,
            "a regularizer, the name of one, or None",
        )
        if cell is not None:
            _check_cell(cell, cell_arguments)
        self_made = cell is None
        if self_made:
            cell = ScratchLSTMCell(
                **cell_arguments,
                name="lstm_cell",
                dtype=kwargs.get("dtype"),
                trainable=kwargs.get("trainable", True),
            )
        super().__init__(
            cell,
            **flags,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.time_major = time_major
        self.use_cudnn = use_cudnn
        self._cell_is_self_made = self_made
        self.recurrence: str | None = None

    units = _of_the_cell("units")
    activation = _of_the_cell("activation")
    recurrent_activation = _of_the_cell("recurrent_activation")
    use_bias = _of_the_cell("use_bias")
    kernel_initializer = _of_the_cell("kernel_initializer")
    recurrent_initializer = _of_the_cell("recurrent_initializer")
    bias_initializer = _of_the_cell("bias_initializer")
    unit_forget_bias = _of_the_cell("unit_forget_bias")
    kernel_regularizer = _of_the_cell("kernel_regularizer")
    recurrent_regularizer = _of_the_cell("recurrent_regularizer")
    bias_regularizer = _of_the_cell("bias_regularizer")
    kernel_constraint = _of_the_cell("kernel_constraint")
    recurrent_constraint = _of_the_cell("recurrent_constraint")
    bias_constraint = _of_the_cell("bias_constraint")
    dropout = _of_the_cell("dropout")
    recurrent_dropout = _of_the_cell("recurrent_dropout")
    seed = _of_the_cell("seed")

    @property
    def variables(self) -> list[Any]:
        """The weights, the random seeds, and the states of a stateful layer."""
        # Keras keeps the states of an RNN to itself. But only what stands here
        # is carried from step to step by `fit` and `predict` on JAX.
        return [*super().variables, *(self.states or [])]

    def build(self, sequences_shape: Shape, initial_state_shape: Any = None) -> None:
        self._check_sequences_shape(sequences_shape)
        sequences_shape = self._batch_major(sequences_shape)
        if self.stateful and sequences_shape[0] is None:
            raise ValueError(
                f"`{self.name}` is stateful and got `sequences` of shape "
                f"{tuple(sequences_shape)}; expected a known batch size, as with "
                "`keras.Input(batch_shape=(32, None, 8))`."
            )
        super().build(sequences_shape, initial_state_shape)
        for state in self.states or []:
            keep_dtype(state)  # else torch loses them under mixed precision
        time, batch, features = None, None, sequences_shape[2]
        self.input_spec = keras.InputSpec(shape=(batch, time, features))
        self.built = True

    def call(
        self,
        sequences: Tensor,
        initial_state: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        training: bool = False,
    ) -> Any:
        if isinstance(mask, (list, tuple)):  # one of the states, too
            mask = mask[0] if mask else None
        if mask is not None:
            mask = _validation.numbers_only("mask", mask, "truth values")
            mask = ops.convert_to_tensor(mask)
            self._check_mask(mask, sequences)
        if self.time_major:
            sequences = ops.swapaxes(sequences, 0, 1)
            mask = None if mask is None else ops.swapaxes(mask, 0, 1)
        self._check_sequences(sequences)
        if initial_state is not None:
            self._check_initial_state(initial_state, sequences.shape[0])
        elif self.stateful:
            # A copy, since on torch the states are overwritten in place, which
            # the backward pass must not see.
            initial_state = [ops.copy(state) for state in self.states]
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
        ways = {}
        if self._follows_the_equations(training):
            ways = recurrence.implementations(self.use_cudnn)
        for way, lstm in ways.items():
            try:
                result = self._run(lstm, sequences, initial_state, mask, training)
            except NotImplementedError:
                continue
            self.recurrence = way
            return result
        if self.use_cudnn is True:
            raise ValueError(
                f"`use_cudnn` is True, but `{self.name}` can't run in cuDNN on this "
                "machine or with these arguments; expected 'auto' to leave the choice "
                "to the layer."
            )
        self.recurrence = "loop"
        return super().inner_loop(sequences, initial_state, mask, training)

    def _follows_the_equations(self, training):
        """Whether the steps are the plain ones, which `recurrence` runs faster."""
        cell = self.cell
        return (
            type(cell).call is ScratchLSTMCell.call
            and type(cell).gates is ScratchLSTMCell.gates
            and cell.activation is keras.activations.tanh
            and cell.recurrent_activation is keras.activations.sigmoid
            and not (training and cell.recurrent_dropout)
            and not self.unroll
        )

    def _run(self, lstm, sequences, initial_state, mask, training):
        cell = self.cell
        if training and 0 < cell.dropout < 1:
            dropped = cell.get_dropout_mask(sequences[:, 0, :])
            sequences = sequences * ops.expand_dims(dropped, 1)
        x = ops.swapaxes(ops.cast(sequences, cell.compute_dtype), 0, 1)
        if mask is not None:
            mask = ops.swapaxes(ops.cast(mask, "bool"), 0, 1)
        if self.go_backwards:
            x = ops.flip(x, 0)
            mask = None if mask is None else ops.flip(mask, 0)

        def by_letter(letter):
            weights = [getattr(cell, letter + gate) for gate in GATES]
            return [ops.cast(weight, cell.compute_dtype) for weight in weights]

        W_x, W_h = by_letter("W_x"), by_letter("W_h")
        b = by_letter("b_") if cell.use_bias else None
        h_all, h, c = lstm(x, *initial_state, W_x, W_h, b, mask, training)
        if mask is not None and self.zero_output_for_mask:
            h_all = h_all * ops.cast(mask, h_all.dtype)[:, :, None]
        return h_all[-1], ops.swapaxes(h_all, 0, 1), [h, c]

    def compute_output_shape(
        self, sequences_shape: Shape, initial_state_shape: Any = None
    ) -> Any:
        self._check_sequences_shape(sequences_shape)
        shape = super().compute_output_shape(self._batch_major(sequences_shape))
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
        if self._cell_is_self_made:
            cell_config = self.cell.get_config()
            config |= {name: cell_config[name] for name in _CELL_DEFAULTS}
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
        config = dict(_validation.config(config))
        if isinstance(config.get("cell"), dict):
            config["cell"] = keras.saving.deserialize_keras_object(config["cell"])
        return cls(**config)

    def _batch_major(self, shape):
        """`(time, batch, …)` with the batch first, and the other way round."""
        if not self.time_major:
            return shape
        time, batch, *rest = shape
        return (batch, time, *rest)

    def _check_sequences_shape(self, shape):
        if not _validation.is_shape(shape, ndim=3):
            first = "time, batch" if self.time_major else "batch, time"
            raise ValueError(
                f"`{self.name}` got `sequences` of shape {shape}; expected "
                f"({first}, features) with known features."
            )

    def _check_mask(self, mask, sequences):
        shape, expected = tuple(mask.shape), tuple(sequences.shape[:2])
        if not _may_be_equal(shape, expected):
            raise ValueError(
                f"`{self.name}` got `mask` of shape {shape}; expected {expected}, as "
                "the `sequences` have it."
            )

    def _check_sequences(self, sequences):
        shape = tuple(sequences.shape)
        if shape[1] == 0:
            raise ValueError(
                f"`{self.name}` got `sequences` of shape {shape}, batch first; "
                "expected at least one step."
            )
        if not _validation.are_numbers(sequences):
            raise ValueError(
                f"`{self.name}` got `sequences` of {_validation.dtype_of(sequences)}; "
                "expected real numbers."
            )
        batch_size = sequences.shape[0]
        expected = self.states[0].shape[0] if self.stateful else None
        if not _may_be_equal((batch_size,), (expected,)):
            raise ValueError(
                f"`{self.name}` is stateful and got `sequences` with a batch size of "
                f"{batch_size}; expected {expected}, the batch size of its states."
            )

    def _check_initial_state(self, initial_state, batch_size):
        states = keras.tree.flatten(initial_state)
        shapes = [tuple(getattr(state, "shape", ())) for state in states]
        expected = [(batch_size, size) for size in self.state_size]
        if len(shapes) != len(expected) or not all(
            map(_may_be_equal, shapes, expected)
        ):
            raise ValueError(
                f"`{self.name}` got `initial_state` of shapes {shapes}; expected "
                f"{expected}."
            )


def _may_be_equal(shape, other):
    """Whether two shapes are equal as far as they are known."""
    return len(shape) == len(other) and all(
        None in sizes or sizes[0] == sizes[1]
        for sizes in zip(shape, other, strict=True)
    )


def _check_cell(cell, arguments):
    if not isinstance(cell, ScratchLSTMCell):
        raise ValueError(
            f"`cell` is {cell!r}; expected a `ScratchLSTMCell` or an instance of a "
            "subclass. For other cells there is `keras.layers.RNN`."
        )
    for name, value in arguments.items():
        default = None if name == "units" else _CELL_DEFAULTS[name]
        if not np.array_equal(value, default):  # the value may be anything
            raise ValueError(
                f"`{name}` is {value!r} beside a `cell`; expected it to be left out, "
                "since it is the cell's to choose."
            )
