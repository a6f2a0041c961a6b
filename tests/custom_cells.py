import keras

from keras_scratch_lstm import ScratchLSTMCell


@keras.saving.register_keras_serializable("tests")
class CoupledCell(ScratchLSTMCell):
    """Its forget gate is `1 - i`."""

    def gates(self, x, h, c):
        gates = super().gates(x, h, c)
        return gates._replace(f=1 - gates.i)


@keras.saving.register_keras_serializable("tests")
class PeepholeCell(ScratchLSTMCell):
    """Its forget gate depends on the cell state."""

    def build(self, input_shape):
        super().build(input_shape)
        self.W_cf = self.add_weight(
            name="W_cf", shape=(self.units,), initializer="random_normal"
        )

    def gates(self, x, h, c):
        z = x @ self.W_xf + h @ self.W_hf + self.b_f + c * self.W_cf
        return super().gates(x, h, c)._replace(f=keras.ops.sigmoid(z))


@keras.saving.register_keras_serializable("tests")
class ScaledCell(ScratchLSTMCell):
    """Its output is not `h`."""

    def call(self, inputs, states, training=False):
        h, states = super().call(inputs, states, training)
        return 2 * h + 1, states
