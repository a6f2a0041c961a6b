"""Plots of gate traces and experiments. Needs `matplotlib`.

Each function returns a `matplotlib.figure.Figure`, and saves it if `path` is given.

Example:

>>> import numpy as np, keras
>>> from keras_scratch_lstm import plotting, trace_gates
>>> layer = keras.layers.LSTM(8)
>>> h = layer(np.ones((1, 4, 3)))
>>> trace = trace_gates(layer, np.ones((1, 4, 3)))
>>> figure = plotting.plot_gates(trace, units=[0, 5], tokens="time")
>>> [ax.get_ylabel() for ax in figure.axes]
['unit 0', 'unit 5']
"""

try:
    import matplotlib  # noqa: F401
except ImportError:
    raise ImportError(
        "`keras_scratch_lstm.plotting` needs matplotlib. Run `pip install matplotlib`."
    ) from None

from keras_scratch_lstm.plotting.experiments import (
    plot_ablation,
    plot_attribution,
    plot_gradients,
)
from keras_scratch_lstm.plotting.gates import (
    plot_gates,
    plot_heatmap,
    plot_saturation,
    plot_text,
)

__all__ = [
    "plot_ablation",
    "plot_attribution",
    "plot_gates",
    "plot_gradients",
    "plot_heatmap",
    "plot_saturation",
    "plot_text",
]
