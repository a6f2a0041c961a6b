"""A callback for `fit`: `PerplexityLogger`."""

import math
import re
import time
import warnings
from typing import Any

import keras
from keras import ops

from keras_scratch_lstm import _keras
from keras_scratch_lstm._types import Logs
from keras_scratch_lstm.metrics import Perplexity

CROSS_ENTROPIES = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy,
)


class PerplexityLogger(keras.callbacks.Callback):
    """Add perplexity and training speed to the logs of each epoch.

    `History`, the progress bar and the callbacks after this one see them, so pass it
    before `CSVLogger` and others that read the logs:

    - `perplexity` and `val_perplexity`: the exponential of the loss, if this is a mean
      (sparse) categorical cross-entropy. With several outputs: `<output>_perplexity`.
      A `Perplexity` metric of the model takes precedence. Add one if the model has
      regularization losses, sample weights or masks.
    - `tokens_per_sec`, the tokens per second of the epoch without its validation. The
      tokens are those that a `Perplexity` metric of the model counts. Without one, they
      are the predictions, padding included, if the number of time steps is fixed. Of
      several outputs, the one with the most tokens counts.

    When training ends, it prints a line in the format of *Dive into Deep Learning*:

        perplexity 1.0, 57421.3 tokens/sec on /CPU:0

    Args:
        verbose: 0 or 1, whether to print this line. Default: 1.

    Attributes:
        closing_line: String, this line; empty before the first epoch ends.
        tokens_per_sec: Float, the tokens per second over all epochs, or `None`.
        seconds: Float, the duration of all epochs.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import PerplexityLogger
    >>> model = keras.Sequential([keras.Input((5, 7)), keras.layers.Dense(7)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile(loss=loss)
    >>> x, y = np.zeros((4, 5, 7)), np.zeros((4, 5), "int32")
    >>> logger = PerplexityLogger(verbose=0)
    >>> history = model.fit(x, y, callbacks=[logger], verbose=0)
    >>> sorted(history.history)
    ['loss', 'perplexity', 'tokens_per_sec']
    """

    def __init__(self, verbose: int = 1) -> None:
        super().__init__()
        self.verbose = verbose
        self._reset()

    def _reset(self) -> None:
        self.closing_line = ""
        self.tokens_per_sec: float | None = None
        self.seconds = 0.0
        self._tokens = 0
        self._start: Any = None
        self._epoch_seconds: float | None = 0.0

    def on_train_begin(self, logs: Logs = None) -> None:
        self._reset()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._epoch_seconds = None
        self._epoch_start = time.perf_counter()
        if self._start is None:
            self._start = self._epoch_start

    def on_test_begin(self, logs: Logs = None) -> None:
        # Validation within `fit` counts its own predictions from here on.
        self._end_training_of_epoch()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._end_training_of_epoch()
        self.seconds = time.perf_counter() - self._start
        logs = {} if logs is None else logs
        self._add_perplexities(logs)
        names = [name for name in logs if re.match(r"(?!val_).*perplexity$", name)]
        names = names or [name for name in logs if name == "loss"]
        parts = [f"{name} {logs[name]:.1f}" for name in names]
        if self._epoch_tokens:
            logs["tokens_per_sec"] = self._epoch_tokens / self._epoch_seconds
            self._tokens += self._epoch_tokens
            self.tokens_per_sec = self._tokens / self.seconds
            parts.append(f"{self.tokens_per_sec:.1f} tokens/sec")
        else:
            _warn(
                "`tokens_per_sec` is not logged, since the number of time steps is not "
                "fixed or `train_step` is custom. Compile the model with "
                "`metrics=[Perplexity()]` to log it."
            )
        self.closing_line = ", ".join(parts) + _device_of(self.model)

    def on_train_end(self, logs: Logs = None) -> None:
        if self.verbose and self.closing_line:
            print(self.closing_line)

    def _end_training_of_epoch(self):
        if self._epoch_seconds is None:
            # Reading a metric waits for the batches that a GPU still processes.
            self._epoch_tokens = _count_tokens(self.model)
            self._epoch_seconds = time.perf_counter() - self._epoch_start

    def _add_perplexities(self, logs):
        for name, (loss, weight) in _cross_entropies(self.model).items():
            for prefix in ("", "val_"):
                if prefix + name in logs or prefix + loss not in logs:
                    continue
                if weight:
                    logs[prefix + name] = _exp(logs[prefix + loss] / weight)
                else:
                    _warn(
                        f"`{name}` is not logged, since the loss includes more than "
                        "the cross-entropy, such as regularization losses. Compile "
                        "the model with `metrics=[Perplexity()]` to log it."
                    )


def _warn(message):
    """Warn; by default, Python shows equal warnings once."""
    warnings.warn(message, stacklevel=3)


def _cross_entropies(model):
    """Map the perplexity of an output to its loss in the logs, and the weight there.

    The weight is 0 if the loss includes more than the cross-entropy.
    """
    losses = _keras.compiled_losses(model)
    names = [loss.name for loss in losses]
    found = {
        f"{name}_perplexity": (f"{name}_loss", 1)  # no added losses, no weights
        for name, (_, loss, _, _) in zip(names, losses, strict=True)
        if _is_cross_entropy(loss) and names.count(name) == 1
    }
    if len(losses) != 1 or not found:
        return found
    (name,) = found
    if len(getattr(model, "outputs", None) or ()) <= 1:
        name = "perplexity"
    weight = 1 if losses[0].loss_weights is None else losses[0].loss_weights
    if model.losses or type(model).compute_loss is not keras.Model.compute_loss:
        weight = 0
    return {name: ("loss", weight)}


def _is_cross_entropy(loss):
    """Return whether a loss is the mean cross-entropy of a token."""
    return (
        getattr(loss, "fn", None) in CROSS_ENTROPIES
        and type(loss).call is keras.losses.SparseCategoricalCrossentropy.call
        and loss.reduction not in ("sum", "none", None)
        and not getattr(loss, "label_smoothing", 0)
    )


def _exp(value):
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _count_tokens(model):
    """Return the tokens since the metrics of a model were reset, or 0 if unknown."""
    metrics = keras.tree.flatten([getattr(m, "metrics", m) for m in model.metrics])
    counts = [metric.tokens for metric in metrics if isinstance(metric, Perplexity)]
    if not counts and type(model).train_step is keras.Model.train_step:
        outputs = keras.tree.flatten(getattr(model, "outputs", None) or [])
        steps = [output.shape[1:-1] for output in outputs]
        if steps and not any(None in shape for shape in steps):
            # The metric of the loss counts the samples.
            steps = max(math.prod(shape) for shape in steps)
            counts = [metric.count * steps for metric in metrics[:1]]
    return max((float(ops.convert_to_numpy(count)) for count in counts), default=0)


def _device_of(model):
    """Return `" on /CPU:0"`, the device of the model's first weight."""
    device = str(getattr(model.weights[0].value, "device", "")) if model.weights else ""
    found = re.search(r"(cpu|gpu|cuda|tpu|mps)[:_]?(\d*)$", device.lower())
    if not found:
        return ""
    kind, index = found.groups()
    return f" on /{kind.replace('cuda', 'gpu').upper()}:{index or 0}"
