"""Perplexity, token by token."""

from typing import Any

import keras
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm._keras import get_keras_mask
from keras_scratch_lstm._types import Config, Tensor


@keras.saving.register_keras_serializable("keras_scratch_lstm")
class Perplexity(keras.metrics.Metric):
    """exp of the mean cross-entropy of a token.

        perplexity = exp(total cross-entropy / total tokens)

    Both totals run over everything seen since the last reset. So the result
    does not depend on how the tokens were cut into batches, which a mean of
    each batch's perplexity does. The totals carry their rounding errors along
    (Kahan's summation), so that long epochs stay exact in float32.

    A uniform guess among `n` tokens has perplexity `n`; certainty has 1.

    Args:
        name: String. Default: `"perplexity"`.
        from_logits: Boolean, whether `y_pred` holds logits, as a `Dense` layer
            without activation gives them, or probabilities; these are clipped at
            `keras.config.epsilon()`, as in Keras's losses. Default: `True`.
        ignore_class: Integer, a token that does not count where it is the
            target, such as padding. Default: `None`.
        dtype: The dtype of the totals and of the result. Default: float32.

    Call arguments:
        y_true: Integer tensor of shape `(batch, time)` or `(batch,)`, the
            tokens that came.
        y_pred: Tensor of shape `(batch, time, vocabulary)` or
            `(batch, vocabulary)`, the predictions. Its Keras mask, if it has
            one, is heeded.
        sample_weight: Tensor of shape `(batch,)`, `(batch, 1)` or that of
            `y_true`: how much each token counts. Default: `None`.

    Returns:
        Scalar, at least 1; 0 before the first token. NaN, once a token that counts
        is not in the vocabulary.

    Raises:
        ValueError: The shapes do not fit together.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import Perplexity
    >>> perplexity = Perplexity()
    >>> perplexity.update_state(np.array([[3, 1]]), np.zeros((1, 2, 28)))
    >>> round(float(perplexity.result()), 3)
    28.0

    Reference:

    - [Jelinek, Mercer, Bahl and Baker, 1977](
        https://doi.org/10.1121/1.2016299)
    - [Kahan, 1965](https://doi.org/10.1145/363707.363723)
    """

    def __init__(
        self,
        name: str = "perplexity",
        from_logits: bool = True,
        ignore_class: int | None = None,
        dtype: Any = None,
    ) -> None:
        if not isinstance(name, str | None):
            raise _validation.invalid("name", name, "a string")
        super().__init__(name=name, dtype=_validation.float_dtype(dtype))
        self.from_logits = _validation.flag("from_logits", from_logits)
        self.ignore_class = _validation.integer_or_none("ignore_class", ignore_class)
        self._direction = "down"
        self._cross_entropy = self._add_total("cross_entropy")
        self._tokens = self._add_total("tokens")

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Adds a batch to the totals.

        Args:
            y_true: See the class, as for the others.
            y_pred: See the class.
            sample_weight: See the class. Default: `None`.

        Raises:
            ValueError: The shapes do not fit together.
        """
        mask = get_keras_mask(y_pred)
        y_true = _validation.numbers_only("y_true", y_true, "integer tokens")
        y_pred = _validation.numbers_only("y_pred", y_pred, "real numbers")
        if sample_weight is not None:
            sample_weight = _validation.numbers_only(
                "sample_weight", sample_weight, "real numbers, or None"
            )
        if tuple(y_pred.shape)[-1:] in ((), (0,)):
            raise _validation.invalid(
                "y_pred", y_pred, "a number for each token there is"
            )
        y_true = ops.cast(y_true, "int32")
        y_pred = ops.cast(y_pred, self.dtype)
        if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
            y_true = ops.squeeze(y_true, -1)
        _check_shapes(y_true.shape, y_pred.shape[:-1])

        weights = ops.ones_like(y_true, dtype=self.dtype)
        for factor in (sample_weight, mask):
            if factor is not None:
                weights = weights * self._spread(factor, y_true)
        if self.ignore_class is not None:
            ignored = ops.equal(y_true, self.ignore_class)
            weights = ops.where(ignored, 0, weights)
        # What is no index is an error on one backend and a zero on another.
        known = ops.logical_and(y_true >= 0, y_true < ops.shape(y_pred)[-1])
        y_true = ops.where(known, y_true, 0)

        cross_entropy = ops.sparse_categorical_crossentropy(
            y_true, y_pred, from_logits=self.from_logits
        )
        cross_entropy = ops.where(known, cross_entropy, float("nan"))
        # A token that does not count may hold anything, NaN included.
        cross_entropy = ops.where(ops.equal(weights, 0), 0, cross_entropy)
        _add(self._cross_entropy, ops.sum(cross_entropy * weights))
        _add(self._tokens, ops.sum(weights))

    def result(self) -> Tensor:
        """The perplexity of all tokens since the last reset.

        Returns:
            Scalar tensor, at least 1; 0 before the first token.
        """
        cross_entropy, tokens = map(_total, (self._cross_entropy, self._tokens))
        some = ops.not_equal(tokens, 0)
        mean = cross_entropy / ops.where(some, tokens, 1)
        return ops.where(some, ops.exp(mean), 0)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
        }

    def _add_total(self, name):
        """A sum, and the rounding error that it has not taken in yet."""
        return tuple(
            self.add_variable(shape=(), initializer="zeros", name=name + suffix)
            for suffix in ("", "_error")
        )

    def _spread(self, factor, y_true):
        """Weights for samples or tokens, as weights for tokens."""
        factor = ops.cast(factor, self.dtype)
        while 0 < len(factor.shape) < len(y_true.shape):
            factor = ops.expand_dims(factor, -1)
        if not _fits(factor.shape, y_true.shape):
            raise ValueError(
                f"`sample_weight` has the shape {tuple(factor.shape)}; expected one "
                f"weight a sample or a token of `y_true`, {tuple(y_true.shape)}."
            )
        return factor


def _check_shapes(y_true, expected):
    if len(y_true) != len(expected) or not _fits(y_true, expected, ones=False):
        raise ValueError(
            f"`y_true` has the shape {tuple(y_true)}; expected integer tokens of the "
            f"shape of `y_pred` without its last axis, {tuple(expected)}."
        )


def _fits(shape, target, ones=True):
    """Whether a shape, perhaps not all known, can be spread to another."""
    return len(shape) <= len(target) and all(
        have == want or None in (have, want) or (ones and have == 1)
        for have, want in zip(shape, target, strict=False)
    )


def _add(total, value):
    total, error = total
    value = value - error
    new = total + value
    error.assign((new - total) - value)
    total.assign(new)


def _total(total):
    total, error = total
    return total - error
