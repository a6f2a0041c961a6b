"""`GateMonitor`: statistics of the gates while a model trains."""

from collections.abc import Iterable, Sequence

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import _validation
from keras_scratch_lstm._types import Data, Layer, Logs
from keras_scratch_lstm.observing import models
from keras_scratch_lstm.observing.inputs import check_inputs, read_batches
from keras_scratch_lstm.per_gate import named_weights
from keras_scratch_lstm.tracing.gates import trace_gates

METRICS = ("saturation", "weight_norms")


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
        self, probe: Data, layer: Layer | None = None, metrics: Sequence[str] = METRICS
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
        self._probe = [check_inputs(batch, "probe")[0] for batch, _ in batches]

    def on_train_begin(self, logs: Logs = None) -> None:
        layers = self.layer
        if layers is None:
            layers = models.find_all(self.model)
        elif not isinstance(layers, list | tuple):
            layers = [layers]
        self._lstms = [
            (layer, models.find(self.model, layer))
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
        trace = trace_gates(self.model, dataset, layer=layer, batches=None)
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
