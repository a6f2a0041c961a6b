"""Code of a user, for the type checker: mypy reads it, and nothing runs it.

An `assert_type` fails if a type is lost. A `type: ignore` fails if the checker misses
the mistake on its line.
"""

from typing import Any, assert_type

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_scratch_lstm import (
    Ablation,
    Attribution,
    Edit,
    GateMonitor,
    Gates,
    GateTrace,
    Gradients,
    Perplexity,
    PerplexityLogger,
    ScratchLSTM,
    ScratchLSTMCell,
    ablate_units,
    attribute,
    contextual_decomposition,
    from_torch,
    run_with_edits,
    to_builtin,
    to_scratch,
    to_torch,
    trace_gates,
    trace_gradients,
)
from keras_scratch_lstm.plotting import plot_gates, plot_text
from keras_scratch_lstm.tracing import Saturation


class CoupledCell(ScratchLSTMCell):
    def gates(self, x: Any, h: Any, c: Any) -> Gates:
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


def layers() -> None:
    cell = ScratchLSTMCell(
        4,
        activation=keras.activations.relu,
        kernel_initializer={"i": "zeros", "f": keras.initializers.Orthogonal()},
        recurrent_regularizer={"f": "l2"},
        name="cell",
    )
    assert_type(cell.get_config(), dict[str, Any])
    assert_type(cell(np.ones((2, 3)), cell.get_initial_state(2)), Any)
    layer = ScratchLSTM(4, return_sequences=True, use_cudnn=False, implementation=2)
    assert_type(layer.recurrence, str | None)
    print(layer.cell.W_hf.shape, ScratchLSTM(cell=CoupledCell(4)))

    ScratchLSTMCell("4")  # type: ignore[arg-type]
    ScratchLSTM(cell="a cell")  # type: ignore[arg-type]


def training(model: Any, x: np.ndarray) -> None:
    model.compile(metrics=[Perplexity(ignore_class=0)])
    logger = PerplexityLogger(verbose=0)
    model.fit(x, callbacks=[GateMonitor(x, layer=["lstm", "lstm_1"]), logger])
    GateMonitor(x, metrics=("saturation",))
    assert_type(logger.closing_line, str)
    assert_type(logger.tokens_per_sec, float | None)
    Perplexity(from_logits="yes")  # type: ignore[arg-type]


def tracing(model: Any, x: np.ndarray) -> None:
    trace = trace_gates(model, x, layer="lstm")
    assert_type(trace, GateTrace)
    assert_type(trace.f, np.ndarray)
    assert_type(trace.mask, np.ndarray | None)
    assert_type(trace.saturation(), dict[str, Saturation])
    assert_type(trace.correlate({"space": x == 1}), dict[str, np.ndarray])
    trace.to_html("gates.html", ["some", "words"], sample=1)
    trace.to_html("gates.html", inputs=x, feature_names=["a"], times=x, scores=x)
    assert_type(GateTrace.load("trace.npz"), GateTrace)
    trace_gates("model.keras", x, layer=-1, batches=None)
    trace_gates(model, x, batch_size="all")  # type: ignore[arg-type]


def experiments(model: Any, x: np.ndarray, trace: GateTrace) -> None:
    edits = [Edit("h", 0.0, units=[3]), Edit("c", trace, steps=slice(5, None))]
    assert_type(run_with_edits(model, x, edits=edits, layer="lstm")[1], GateTrace)
    assert_type(ablate_units(model, x, x, loss="mse", units=[1]), Ablation)
    assert_type(trace_gradients(model, x, x, layer="rnn"), Gradients)
    assert_type(contextual_decomposition(model, x, steps=slice(3)).beta, np.ndarray)
    found = attribute(model, x, target=(-1, slice(3)), keep=["hour"], wrt="lstm")
    assert_type(found, Attribution)
    assert_type(found.difference, np.ndarray)
    attribute(model, x, target=0, method="saliency")  # type: ignore[arg-type]
    Edit("h", 0.0, units=1.5)  # type: ignore[arg-type]


def plotting(trace: GateTrace) -> None:
    assert_type(plot_gates(trace, units=[1, 2], tokens="a text"), Figure)
    assert_type(plot_text(trace, unit=3, tokens=["a text", "another"]), Figure)
    plot_gates(trace)  # type: ignore[call-arg]


def conversion(model: Any, lstm: Any) -> None:
    print(to_builtin(to_scratch(model)))
    layer = from_torch(lstm, return_sequences=True)
    assert_type(to_torch(layer), dict[str, np.ndarray])
    to_torch(layer, "lstm.")  # type: ignore[call-arg]
