"""How the gates fare while a model trains."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_scratch_lstm import checks
from keras_scratch_lstm._types import Logs
from keras_scratch_lstm.gates import (
    check_inputs,
    find_lstms,
    trace_gates,
    weights_by_letter,
)


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
            raise checks.wrong("layer", layer, "the name of a layer, or the layer")
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
            for name, weight in weights_by_letter(lstm.cell):
                norm = np.linalg.norm(ops.convert_to_numpy(weight))
                logs[f"{lstm.name}/{name}_norm"] = float(norm)
