"""The `Perplexity` metric."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm._types import Config, Tensor


@keras.saving.register_keras_serializable("keras_scratch_lstm")
class Perplexity(keras.metrics.Metric):
    """Perplexity: the exponential of the mean cross-entropy per token.

        perplexity = exp(total cross-entropy / number of tokens)

    Both totals accumulate over all batches since the last reset, so the result
    does not depend on how the tokens are batched. A mean of per-batch
    perplexities does. A uniform guess among `n` tokens has perplexity `n`; a
    perfect prediction has perplexity 1.

    Args:
        name: String. Default: `"perplexity"`.
        from_logits: Boolean, whether `y_pred` contains logits (the output of a
            `Dense` layer without activation) or probabilities. Probabilities are
            clipped at `keras.config.epsilon()` and normalized, so a row of zeros
            counts as a uniform guess. Default: `True`.
        ignore_class: Integer. Tokens whose target is this class, such as padding,
            are not counted. Default: `None`.
        dtype: The dtype of the computation, at least float32. Default: `None`.

    Call arguments:
        y_true: Tensor of shape `(batch, time)` or `(batch,)`, the target tokens.
        y_pred: Tensor of shape `(batch, time, vocabulary)` or
            `(batch, vocabulary)`, the predictions. Masked time steps are not
            counted.
        sample_weight: Tensor of shape `(batch,)`, `(batch, 1)` or that of
            `y_true`, the weight of each token. Default: `None`.

    Returns:
        Scalar: at least 1; 0 before the first token; NaN if the target of a counted
        token is not an integer from 0 to `vocabulary - 1`.

    Example:

    >>> import numpy as np
    >>> from keras_scratch_lstm import Perplexity
    >>> perplexity = Perplexity()
    >>> perplexity.update_state(np.array([[3, 1]]), np.zeros((1, 2, 28)))
    >>> round(float(perplexity.result()), 3)
    28.0

    References:

    - [Jelinek, Mercer, Bahl and Baker, 1977](https://doi.org/10.1121/1.2016299)
    """

    def __init__(
        self,
        name: str = "perplexity",
        from_logits: bool = True,
        ignore_class: int | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.from_logits = from_logits
        if ignore_class is not None:
            limits = np.iinfo("int32")
            ignore_class = _validation.integer(
                "ignore_class", ignore_class, limits.min, limits.max
            )
        self.ignore_class = ignore_class
        self._dtype_of_totals = keras.backend.result_type(self.dtype, "float32")
        self._cross_entropy = self._add_total("cross_entropy")
        self._tokens = self._add_total("tokens")
        _keras.minimize(self)

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor | None = None
    ) -> None:
        """Add a batch to the totals. See the class for the arguments."""
        dtype = self._dtype_of_totals
        mask = _keras.get_keras_mask(y_pred)
        y_true = _convert_targets(y_true)
        y_pred = ops.cast(y_pred, dtype)
        if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
            y_true = ops.squeeze(y_true, -1)
        # Targets out of range are an error on one backend, zeros on another.
        token = ops.cast(y_true, "int32")
        is_integer = ops.equal(ops.cast(token, y_true.dtype), y_true)
        in_range = ops.logical_and(token >= 0, token < ops.shape(y_pred)[-1])
        valid = ops.logical_and(is_integer, in_range)
        if not self.from_logits:
            y_pred = ops.log(ops.clip(y_pred, keras.config.epsilon(), 1))
        cross_entropy = ops.sparse_categorical_crossentropy(
            ops.where(valid, token, 0), y_pred, from_logits=True
        )
        weights = _product(ops.ones_like(cross_entropy), sample_weight, mask)
        if self.ignore_class is not None:
            ignored = ops.logical_and(is_integer, ops.equal(token, self.ignore_class))
            weights = ops.where(ignored, 0, weights)
        cross_entropy = ops.where(valid, cross_entropy, float("nan"))
        # Predictions that are not counted may be NaN.
        cross_entropy = ops.where(ops.equal(weights, 0), 0, cross_entropy * weights)
        _add(self._cross_entropy, ops.sum(cross_entropy))
        _add(self._tokens, ops.sum(weights))

    def result(self) -> Tensor:
        """Return the perplexity of all tokens since the last reset."""
        total, error = self._cross_entropy
        cross_entropy, tokens = total - error, self.tokens
        counted = ops.not_equal(tokens, 0)
        mean = cross_entropy / ops.where(counted, tokens, 1)
        return ops.where(counted, ops.exp(mean), 0)

    @property
    def tokens(self) -> Tensor:
        """Scalar, the total weight of the tokens since the last reset."""
        total, error = self._tokens
        return total - error

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
        }

    def _add_total(self, name):
        """Create a total and its rounding error, for Kahan summation."""
        dtype = self._dtype_of_totals
        return [
            self.add_variable((), "zeros", dtype, name=name + suffix)
            for suffix in ("", "_error")
        ]


def _product(weights, *factors):
    """Multiply weights by factors that may lack the last axes, or be `None`."""
    for factor in factors:
        if factor is not None:
            factor = ops.cast(factor, weights.dtype)
            while 0 < len(factor.shape) < len(weights.shape):
                factor = ops.expand_dims(factor, -1)
            weights = weights * ops.broadcast_to(factor, ops.shape(weights))
    return weights


def _add(total, value):
    total, error = total
    value = value - error
    new = total + value
    error.assign((new - total) - value)
    total.assign(new)


def _convert_targets(y_true):
    """Return targets as a tensor of a dtype in which none wraps around."""
    if not ops.is_tensor(y_true):
        y_true = np.asarray(y_true)
        if y_true.dtype.kind in "iu":
            # JAX would wrap 64-bit integers around to 32 bits.
            fits = np.all(y_true == y_true.astype("int32"))
            y_true = y_true.astype("int32" if fits else "float32")
    # On TensorFlow, `ops.equal` compares uint64 modulo 2**32.
    is_uint64 = keras.backend.standardize_dtype(y_true.dtype) == "uint64"
    return ops.cast(y_true, "int64") if is_uint64 else ops.convert_to_tensor(y_true)
