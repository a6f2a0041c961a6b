"""Callbacks for `fit`: `PerplexityLogger` and `GateMonitor`."""

import math
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _keras, _validation
from keras_scratch_lstm._types import Logs
from keras_scratch_lstm.metrics import Perplexity
from keras_scratch_lstm.per_gate import named_weights
from keras_scratch_lstm.tracing import capture, trace_gates
from keras_scratch_lstm.tracing.inputs import check_inputs, read_batches

METRICS = ("saturation", "weight_norms")
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


class GateMonitor(keras.callbacks.Callback):
    """Add statistics of the gates of a model's LSTMs to the logs of each epoch.

    At the end of each epoch, the gates are traced on fixed inputs. `History` and the
    callbacks after this one see for an LSTM named `lstm`:

    - `"saturation"`: `lstm/i_left_saturated` and `lstm/i_right_saturated`, and
      likewise for `f` and `o`: the fractions of time steps and units at which the
      gate is below 0.1 and above 0.9.
    - `"weight_norms"`: `lstm/W_xi_norm` and likewise for the other weights: their
      Euclidean norms, per gate for built-in layers too.

    The progress bar omits them. The two layers of a `Bidirectional` layer are logged
    under their own names.

    Args:
        probe: Inputs of the model, as in `trace_gates`; of a dataset, its first
            batch. About ten samples suffice.
        layer: Which LSTMs to monitor: a name, a layer, or a list of these. Default:
            `None`, all LSTMs of the model.
        metrics: Sequence of the statistics to log. Default: both.

    Raises:
        ValueError: If an argument is invalid; when training begins, if the model does
            not have the LSTMs, or several have the same name.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import GateMonitor
    >>> model = keras.Sequential([
    ...     keras.Input((5, 3)), keras.layers.LSTM(4, name="lstm")])
    >>> model.compile(loss="mse")
    >>> x, y = np.zeros((8, 5, 3)), np.zeros((8, 4))
    >>> monitor = GateMonitor(x[:2], metrics=["saturation"])
    >>> history = model.fit(x, y, callbacks=[monitor], verbose=0)
    >>> len(history.history["lstm/f_left_saturated"])
    1

    References:

    - [Karpathy, Johnson and Li, 2015](https://arxiv.org/abs/1506.02078)
    """

    def __init__(
        self, probe: Any, layer: Any = None, metrics: Sequence[str] = METRICS
    ) -> None:
        super().__init__()
        names = list(metrics) if isinstance(metrics, Iterable) else [metrics]
        if isinstance(metrics, str) or not all(name in METRICS for name in names):
            raise _validation.invalid(
                "metrics", metrics, "a list with 'saturation', 'weight_norms' or both"
            )
        self.layer = layer
        self.metrics = names
        # A dataset may be shuffled, and an iterator has each batch once.
        batches = read_batches(probe, argument="probe")
        self._probe = [check_inputs(batch, "probe")[0] for batch in batches]

    def on_train_begin(self, logs: Logs = None) -> None:
        layers = self.layer
        if layers is None:
            layers = capture.find_all(self.model)
        elif not isinstance(layers, list | tuple):
            layers = [layers]
        self._lstms = [
            (layer, capture.find_lstms(self.model, layer)[1])
            for layer in layers or [self.layer]  # raises an error if there are none
        ]
        names = [lstm.name for _, lstms in self._lstms for lstm in lstms]
        if len(set(names)) < len(names):
            raise _validation.invalid("layer", names, "LSTMs with different names")
        if self.model.built:
            self._compute()  # Raises an error for an invalid probe before training.
        if hasattr(self.model, "history"):  # not in a custom training loop
            self._hide_from_progress_bar(self.model.history)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._values = self._compute()
        if logs is not None:
            logs.update(self._values)

    def on_train_end(self, logs: Logs = None) -> None:
        if hasattr(self.model, "history"):
            vars(self.model.history).pop("on_epoch_end", None)

    def _hide_from_progress_bar(self, history):
        # Keras runs `History` last, but for the progress bar.
        record = history.on_epoch_end

        def record_and_remove(epoch, logs=None):
            record(epoch, logs)
            for name in self._values:
                logs.pop(name, None)

        history.on_epoch_end = record_and_remove

    def _compute(self):
        values = {}
        for layer, lstms in self._lstms:
            if "saturation" in self.metrics:
                values |= self._saturation(layer, lstms)
            if "weight_norms" in self.metrics:
                values |= _weight_norms(lstms)
        return values

    def _saturation(self, layer, lstms):
        dataset = ((batch,) for batch in self._probe)
        trace = trace_gates(self.model, dataset, layer, batches=None)
        return {
            f"{lstm.name}/{gate}_{side}_saturated": float(fractions.mean())
            for lstm, one in zip(lstms, (trace, trace.backward), strict=False)
            for gate, sides in one.saturation().items()
            for side, fractions in sides._asdict().items()
        }


def _weight_norms(lstms):
    return {
        f"{lstm.name}/{name}_norm": float(np.linalg.norm(ops.convert_to_numpy(weight)))
        for lstm in lstms
        for name, weight in named_weights(lstm.cell)
    }
