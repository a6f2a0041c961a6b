"""Runs the main features with the installed wheel."""

import sys
from pathlib import Path

import keras
import numpy as np

before = set(sys.modules)
import keras_scratch_lstm

# Neither a dependency that Keras has not loaded, nor what few programs use.
new = sys.modules.keys() - before
packages = {name.partition(".")[0] for name in new}
assert packages - sys.stdlib_module_names == {"keras_scratch_lstm"}, packages
few = (".plotting", ".portable", ".__main__")
assert not [name for name in new if name.endswith(few)]

from keras_scratch_lstm import Perplexity, PerplexityLogger, to_scratch, trace_gates
from keras_scratch_lstm.plotting import plot_gates

assert Path(keras_scratch_lstm.__file__).is_relative_to(sys.prefix)

inputs = keras.Input((None,), dtype="int32")
x = keras.layers.Embedding(28, 8)(inputs)
x = keras.layers.LSTM(16, return_sequences=True, name="lstm")(x)
model = to_scratch(keras.Model(inputs, keras.layers.Dense(28)(x)))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile("adam", loss, metrics=[Perplexity()])
tokens = np.arange(6 * 10).reshape(6, 10) % 28
model.fit(tokens, (tokens + 1) % 28, callbacks=[PerplexityLogger()], verbose=0)
trace = trace_gates(model, tokens)
trace.to_html("gates.html", tokens="time machi")
plot_gates(trace, units=[0, 1], path="gates.png")
assert Path("gates.html").stat().st_size > 10_000
assert Path("gates.png").stat().st_size > 10_000
print("The installed wheel works.")
