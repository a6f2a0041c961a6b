"""Write `addons.npz`: outputs and weights of the LSTM cells of TensorFlow Addons.

Run it in an environment with Keras 2:

    pip install tensorflow-cpu==2.15.1 tensorflow-addons==0.23.0
    python tests/compat/make_addons.py
"""

from pathlib import Path

import numpy as np


def main():
    import tensorflow as tf
    import tensorflow_addons as tfa

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6, 3)).astype("float32")
    arrays = {"x": x}
    for cell in (tfa.rnn.PeepholeLSTMCell(5), tfa.rnn.LayerNormLSTMCell(5)):
        rnn = tf.keras.layers.RNN(cell, return_sequences=True)
        rnn.build(x.shape)
        rnn.set_weights([rng.normal(0, 0.5, weight.shape) for weight in cell.weights])
        for k, weight in enumerate(rnn.get_weights()):
            arrays[f"{type(cell).__name__}/{k}"] = weight
        arrays[f"{type(cell).__name__}/outputs"] = rnn(x).numpy()
    np.savez_compressed(Path(__file__).with_name("addons.npz"), **arrays)


if __name__ == "__main__":
    main()
