"""The recurrence on TensorFlow: a while loop with a hand-written backward pass.

There is one matmul per gate, since TensorFlow runs small matmuls in parallel faster
than it splits a fused one. An iteration has several time steps, since it costs as much
as a few ops; but one in inference, since tf2onnx supports one write per iteration.
`docs/backward-pass.md` has the derivation in the same symbols.
"""

import tensorflow as tf
from keras import tree

from keras_scratch_lstm.per_gate import FUSED_ORDER, GATES
from keras_scratch_lstm.recurrence.padding import is_padding, run_padded

UNROLL = 5  # time steps per iteration


def has_gpu():
    """Whether cuDNN is there. Other GPUs, as those of ROCm, run the loop."""
    return tf.test.is_built_with_cuda() and bool(tf.config.list_logical_devices("GPU"))


def gradient(function, tensors):
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(tensors)
    return tape.gradient(value, tensors, unconnected_gradients="zero")


def random_uniform(shape, seed):
    # XLA draws the same integers as TensorFlow, but not the same floats.
    limits = {"minval": None, "maxval": None, "dtype": tf.uint32}
    seed = tf.cast(seed.next(), "int64")
    bits = tf.random.stateless_uniform(shape, seed, alg="philox", **limits)
    return tf.cast(tf.bitwise.right_shift(bits, 8), "float32") / 2**24


def compiled(function):
    return tf.function(function, autograph=False, reduce_retracing=True)


def scan(body, carry, xs, like):
    flat = tree.flatten(xs)
    time = next(tf.shape(x)[0] for x in flat if x is not None)
    arrays = [x if x is None else _array(time, x.dtype).unstack(x) for x in flat]
    stacked = {name: _array(time, y.dtype, y.shape) for name, y in like.items()}

    def iteration(t, carry, stacked):
        values = [None if array is None else array.read(t) for array in arrays]
        carry, ys = body(carry, tree.pack_sequence_as(xs, values))
        written = {name: array.write(t, ys[name]) for name, array in stacked.items()}
        return t + 1, carry, written

    _, carry, stacked = tf.while_loop(
        lambda t, *_: t < time, iteration, (0, carry, stacked), maximum_iterations=time
    )
    return carry, {name: array.stack() for name, array in stacked.items()}


def lstm(x, h, c, W_x, W_h, b, mask, training):
    time, batch = tf.shape(x)[0], tf.shape(x)[1]
    rows = tf.reshape(x, (-1, x.shape[-1]))
    if b is not None:  # fold the bias into the input matmul
        rows = tf.concat([rows, tf.ones_like(rows[:, :1])], 1)
        W_x = [tf.concat([W, b[None]], 0) for W, b in zip(W_x, b, strict=True)]
    units = h.shape[-1]
    z = []
    for W in W_x:
        projected = tf.reshape(tf.matmul(rows, W), (time, batch, units))
        z.append(tf.ensure_shape(projected, (x.shape[0], x.shape[1], units)))
    recurrence = _recurrence(mask, UNROLL if training else 1)
    h_all, h, c = recurrence(*z, h, c, *W_h)
    if mask is not None:  # zeros at leading masked time steps
        seen = tf.cumsum(tf.cast(mask, h.dtype)) > 0
        h_all = tf.where(seen[:, :, None], h_all, 0)
    return h_all, h, c


def lstm_in_cudnn(x, h, c, W_x, W_h, b, mask, training):
    if b is None or x.dtype == tf.bfloat16:
        raise NotImplementedError
    if mask is None:
        return _cudnn(x, h, c, W_x, W_h, b)
    return tf.cond(
        is_padding(mask, h, c),
        lambda: run_padded(_cudnn, x, h, c, W_x, W_h, b, mask),
        lambda: lstm(x, h, c, W_x, W_h, b, mask, training),
    )


def _cudnn(x, h, c, W_x, W_h, b):
    time, batch = tf.shape(x)[0], tf.shape(x)[1]
    h_all, h, c, _, _ = tf.raw_ops.CudnnRNNV3(
        input=tf.transpose(x, (1, 0, 2)),
        input_h=h[:, None],
        input_c=c[:, None],
        params=_pack(W_x, W_h, b),
        sequence_lengths=tf.fill([batch], time),
        rnn_mode="lstm",
        time_major=False,
    )
    return tf.transpose(h_all, (1, 0, 2)), h[:, 0], c[:, 0]


def _pack(W_x, W_h, b):
    """All weights in the order of cuDNN, with units as rows, and its first bias 0."""
    W_x, W_h, b = (
        tf.stack([weights[GATES.index(gate)] for gate in FUSED_ORDER])
        for weights in (W_x, W_h, b)
    )
    matrices = tf.transpose(W_x, (0, 2, 1)), tf.transpose(W_h, (0, 2, 1))
    parts = (*matrices, tf.zeros_like(b), b)
    return tf.concat([tf.reshape(part, [-1]) for part in parts], 0)


def _recurrence(mask, unroll):
    """The loop over projected inputs. The mask has no gradient, so it is a closure."""
    unmasked = None if mask is None else mask[:, :, None]

    @tf.custom_gradient
    def recurrence(z_i, z_f, z_o, z_c, h_0, c_0, *W_h):
        time = tf.shape(z_i)[0] if z_i.shape[0] is None else z_i.shape[0]
        z_all = [_array(time, h_0.dtype).unstack(z) for z in (z_i, z_f, z_o, z_c)]
        empty = [_array(time, h_0.dtype, h_0.shape) for _ in range(6)]
        step = _forward_step(z_all, W_h, unmasked)
        _, h, c, *residuals, h_all = _loop(
            step, (tf.constant(0), h_0, c_0, *empty), time, unroll
        )
        h_all = h_all.stack()
        stacked, graph = [array.stack() for array in residuals], _graph()

        def backward(dh_all, dh_last, dc_last):
            values = residuals
            # A SavedModel cannot capture the TensorArrays of another graph.
            if _graph() is not graph:
                values = [_array(time, h_0.dtype).unstack(value) for value in stacked]
            dh_out = _array(time, h_0.dtype).unstack(dh_all)
            empty = [_array(time, h_0.dtype, h_0.shape) for _ in range(4)]
            step = _backward_step(time, values, dh_out, W_h, unmasked)
            _, dh_0, dc_0, _, *dz = _loop(
                step, (tf.constant(0), dh_last, dc_last, c, *empty), time
            )
            dz = [dz_gate.stack() for dz_gate in dz]
            # One matmul over all time steps for the gradient of each weight.
            units = h_0.shape[-1]
            h_prev = tf.reshape(tf.concat([h_0[None], h_all[:-1]], 0), (-1, units))
            dW_h = [
                tf.matmul(h_prev, tf.reshape(dz_gate, (-1, units)), transpose_a=True)
                for dz_gate in dz
            ]
            return *dz, dh_0, dc_0, *dW_h

        return (h_all, h, c), backward

    return recurrence


def _forward_step(z_all, W_h, unmasked):
    def step(t, h, c, *arrays):
        z_i, z_f, z_o, z_c = (z.read(t) for z in z_all)
        i = tf.sigmoid(z_i + tf.matmul(h, W_h[0]))
        f = tf.sigmoid(z_f + tf.matmul(h, W_h[1]))
        o = tf.sigmoid(z_o + tf.matmul(h, W_h[2]))
        c_tilde = tf.tanh(z_c + tf.matmul(h, W_h[3]))
        c_new = f * c + i * c_tilde
        h_new = o * tf.tanh(c_new)
        if unmasked is not None:
            c_new = tf.where(unmasked[t], c_new, c)
            h_new = tf.where(unmasked[t], h_new, h)
        values = (i, f, o, c_tilde, c, h_new)
        return t + 1, h_new, c_new, *_write(arrays, t, values)

    return step


def _backward_step(time, residuals, dh_out, W_h, unmasked):
    W_hi, W_hf, W_ho, W_hc = (tf.transpose(W) for W in W_h)

    def step(done, dh, dc, c, *arrays):
        t = time - 1 - done
        i, f, o, c_tilde, c_prev = (value.read(t) for value in residuals)
        tanh_c = tf.tanh(c)
        dh += dh_out.read(t)
        if unmasked is not None:  # gradients that bypass a masked time step
            zeros = tf.zeros_like(dh)
            dh_bypass, dc_bypass = (tf.where(unmasked[t], zeros, d) for d in (dh, dc))
            dh, dc = (tf.where(unmasked[t], d, zeros) for d in (dh, dc))
        dc += _tanh_grad(tanh_c, dh * o)
        dz_i = _sigmoid_grad(i, dc * c_tilde)
        dz_f = _sigmoid_grad(f, dc * c_prev)
        dz_o = _sigmoid_grad(o, dh * tanh_c)
        dz_c = _tanh_grad(c_tilde, dc * i)
        dh = (tf.matmul(dz_i, W_hi) + tf.matmul(dz_f, W_hf)) + (
            tf.matmul(dz_o, W_ho) + tf.matmul(dz_c, W_hc)
        )
        dc *= f
        if unmasked is not None:
            dh, dc = dh + dh_bypass, dc + dc_bypass
        arrays = _write(arrays, t, (dz_i, dz_f, dz_o, dz_c))
        return done + 1, dh, dc, c_prev, *arrays

    return step


def _loop(step, loop_vars, time, unroll=UNROLL):
    """Runs `step` `time` times. The first loop variable counts the steps done."""

    def iteration(*loop_vars):
        for _ in range(unroll):
            loop_vars = step(*loop_vars)
        return loop_vars

    def loop(body, steps, loop_vars):
        # XLA needs the maximum for second derivatives.
        return tf.while_loop(
            lambda done, *_: done + steps <= time,
            body,
            loop_vars,
            maximum_iterations=time,
        )

    if unroll > 1:
        loop_vars = loop(iteration, unroll, loop_vars)
        if isinstance(time, int) and time % unroll == 0:
            return loop_vars
    return loop(step, 1, loop_vars)  # the remainder


def _graph():
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def _array(time, dtype, shape=None):
    return tf.TensorArray(dtype, time, clear_after_read=False, element_shape=shape)


def _write(arrays, t, values):
    return (array.write(t, value) for array, value in zip(arrays, values, strict=True))


def _sigmoid_grad(y, dy):
    return tf.raw_ops.SigmoidGrad(y=y, dy=dy)


def _tanh_grad(y, dy):
    return tf.raw_ops.TanhGrad(y=y, dy=dy)
