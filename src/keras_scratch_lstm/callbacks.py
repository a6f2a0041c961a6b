"""Callbacks: `PerplexityLogger` and `GateMonitor`."""

import math
import re
import time
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Logs
from keras_scratch_lstm.per_gate import named_weights
from keras_scratch_lstm.tracing import trace_gates
from keras_scratch_lstm.tracing.capture import check_inputs, find_lstms


class PerplexityLogger(keras.callbacks.Callback):
    """Adds perplexity and tokens a second to the logs, from the loss alone.

    For a model whose loss is the mean cross-entropy of a token. Each epoch's
    logs, and so `History`, `CSVLogger` and `TensorBoard`, get

    - `perplexity`, exp of the loss; `val_perplexity`, if there is a validation
      loss. A `Perplexity` metric of the model is heard instead where it has
      put these there already: it alone is exact where the number of tokens
      differs between batches of the same size, or where the loss has
      regularization penalties in it.
    - `tokens_per_sec`, the tokens of the epoch over the time that its training
      took, validation left out. A token is one prediction: batch times time.
      It is missing where the model's output shape leaves the time open.

    Place it before the callbacks that are to see its numbers. In the end it
    prints the book's closing line, with the tokens and the time of all epochs,
    from the start of the first to the end of the last:

        perplexity 1.0, 57421.3 tokens/sec on /CPU:0

    Args:
        verbose: 0 or 1, whether to print the closing line; `closing_line` has
            it anyhow. Default: 1.

    Attributes:
        closing_line: String, the line above; empty before the first epoch ends.
        tokens_per_sec: Float, the rate of all epochs so far, or `None`.
        seconds: Float, the time of all epochs so far.

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

    Reference:

    - [Zhang, Lipton, Li and Smola, 2023](
        https://d2l.ai/chapter_recurrent-neural-networks/rnn-scratch.html)
    """

    def __init__(self, verbose: int = 1) -> None:
        super().__init__()
        self.verbose = _validation.flag("verbose", verbose)
        self.on_train_begin()

    def on_train_begin(self, logs: Logs = None) -> None:
        self.closing_line = ""
        self.tokens_per_sec: float | None = None
        self.seconds = 0.0
        self._tokens = 0
        self._start: Any = None
        self._epoch_seconds: float | None = 0.0
        self._warned = False

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._epoch_start = time.perf_counter()
        if self._start is None:
            self._start = self._epoch_start
        self._epoch_seconds = None

    def on_test_begin(self, logs: Logs = None) -> None:
        # Validation within an epoch, and it is about to reset the counts.
        self._end_training_of_epoch()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._end_training_of_epoch()
        self.seconds = time.perf_counter() - self._start
        logs = {} if logs is None else logs
        for prefix in ("", "val_"):
            if f"{prefix}loss" in logs and f"{prefix}perplexity" not in logs:
                self._warn_of_penalties()
                logs[f"{prefix}perplexity"] = _exp(logs[f"{prefix}loss"])
        speed = ""
        if self._epoch_tokens is not None:
            logs["tokens_per_sec"] = self._epoch_tokens / self._epoch_seconds
            self._tokens += self._epoch_tokens
            self.tokens_per_sec = self._tokens / self.seconds
            speed = f", {self.tokens_per_sec:.1f} tokens/sec"
        perplexity = logs.get("perplexity", math.nan)
        self.closing_line = f"perplexity {perplexity:.1f}{speed}{self._on_device()}"

    def on_train_end(self, logs: Logs = None) -> None:
        if self.verbose and self.closing_line:
            print(self.closing_line)

    def _end_training_of_epoch(self):
        if self._epoch_seconds is None:
            self._epoch_seconds = time.perf_counter() - self._epoch_start
            self._epoch_tokens = self._count_tokens()

    def _count_tokens(self):
        """Samples, as the model's own mean loss counts them, times time steps."""
        shape = getattr(self.model, "output_shape", None)
        losses = [metric for metric in self.model.metrics if metric.name == "loss"]
        if not losses or not isinstance(shape, tuple) or None in shape[1:-1]:
            return None
        # On several replicas of TensorFlow, the count is the sum over them.
        samples = keras.ops.convert_to_numpy(losses[0].count)
        return int(samples) * math.prod(shape[1:-1])

    def _warn_of_penalties(self):
        if self.model.losses and not self._warned:
            self._warned = True
            warnings.warn(
                "The loss has regularization penalties in it, and so has the "
                "perplexity taken from it: compile the model with "
                "`metrics=[Perplexity()]` to have the perplexity alone.",
                stacklevel=2,
            )

    def _on_device(self):
        """`" on /CPU:0"`, from where the model's first weight lies."""
        weights = self.model.weights
        device = str(getattr(weights[0].value, "device", "")) if weights else ""
        found = re.search(r"(cpu|gpu|cuda|tpu|mps)[:_]?(\d*)$", device.lower())
        if not found:
            return ""
        kind, index = found.groups()
        return f" on /{kind.replace('cuda', 'gpu').upper()}:{index or 0}"


def _exp(loss):
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class GateMonitor(keras.callbacks.Callback):
    """Adds figures of an LSTM's gates to the logs of `fit`, by name.

    At the end of each epoch it runs the model on a probe of its own, which stays
    the same, and puts into the epoch's logs, and so into `History`, `CSVLogger`
    and `TensorBoard`, for an LSTM named `lstm`

    - `lstm/i_left_saturated` and `lstm/i_right_saturated`, and the same of `f`
      and `o`: the shares of steps and units at which the gate is below 0.1, and
      above 0.9;
    - `lstm/W_xi_norm`, and the same of the other weights: their Euclidean
      norms, also for a built-in layer, whose gates' weights lie in one array.

    In a `Bidirectional` layer, both directions are monitored, each under its own
    name.

    Place it before the callbacks that are to see its numbers.

    Args:
        probe: Inputs of the model, as `trace_gates` takes them; some ten samples
            will do. For a stateful model, as many as its batch size.
        layer: The layer's name, or the layer, where the model has several LSTMs.
            Default: `None`.

    Raises:
        ValueError: When training begins, where the model has no such LSTM.

    Example:

    >>> import numpy as np, keras
    >>> from keras_scratch_lstm import GateMonitor
    >>> model = keras.Sequential([
    ...     keras.Input((5, 3)), keras.layers.LSTM(4, name="lstm")])
    >>> model.compile(loss="mse")
    >>> x, y = np.zeros((8, 5, 3)), np.zeros((8, 4))
    >>> history = model.fit(x, y, callbacks=[GateMonitor(x[:2])], verbose=0)
    >>> len(history.history["lstm/f_left_saturated"])
    1
    >>> [name for name in history.history if name.startswith("lstm/W_hf")]
    ['lstm/W_hf_norm']

    Reference:

    - [Karpathy, Johnson and Li, 2015](https://arxiv.org/abs/1506.02078)
    """

    def __init__(self, probe: Any, layer: Any = None) -> None:
        super().__init__()
        check_inputs(probe, "probe")
        if not isinstance(layer, str | keras.layers.Layer | None):
            raise _validation.invalid(
                "layer", layer, "the name of a layer, or the layer"
            )
        self.probe = probe
        self.layer = layer

    def on_train_begin(self, logs: Logs = None) -> None:
        # Or an error, before any work is done.
        find_lstms(self.model, self.layer)
        if self.model.built:
            trace_gates(self.model, self.probe, self.layer)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        logs = {} if logs is None else logs
        _, lstms = find_lstms(self.model, self.layer)
        trace = trace_gates(self.model, self.probe, self.layer)
        traces = [one for one in (trace, trace.backward) if one]
        for lstm, trace_of_it in zip(lstms, traces, strict=True):
            for gate, (left, right) in trace_of_it.saturation().items():
                logs[f"{lstm.name}/{gate}_left_saturated"] = float(left.mean())
                logs[f"{lstm.name}/{gate}_right_saturated"] = float(right.mean())
            for name, weight in named_weights(lstm.cell):
                norm = np.linalg.norm(ops.convert_to_numpy(weight))
                logs[f"{lstm.name}/{name}_norm"] = float(norm)
