"""The recurrence on TensorFlow: a loop forth, and a loop back derived by hand.

One product a gate, not one for all gates side by side: TensorFlow runs small
products beside each other faster than one that it cuts up itself. The letters
and the derivation are in docs/backward.md.
"""

import tensorflow as tf


def has_gpu():
    return bool(tf.config.list_logical_devices("GPU"))


def lstm(x, h, c, W_x, W_h, b, mask):
    time, batch = tf.shape(x)[0], tf.shape(x)[1]
    rows = tf.reshape(x, (-1, x.shape[-1]))
    units = h.shape[-1]
    z = []
    for gate, W in enumerate(W_x):
        projected = tf.matmul(rows, W)
        if b is not None:
            projected = tf.nn.bias_add(projected, b[gate])
        projected = tf.reshape(projected, (time, batch, units))
        z.append(tf.ensure_shape(projected, (x.shape[0], x.shape[1], units)))
    h_all, h, c = _recurrence(mask)(*z, h, c, *W_h)
    if mask is not None:  # zeros before the first step that counts
        begun = tf.cumsum(tf.cast(mask, h.dtype)) > 0
        h_all = tf.where(begun[:, :, None], h_all, 0)
    return h_all, h, c


def _recurrence(mask):
    """The loop over projected inputs; the mask, which has no gradient, aside."""

    @tf.custom_gradient
    def recurrence(z_i, z_f, z_o, z_c, h_0, c_0, *W_h):
        time = tf.shape(z_i)[0]
        z = [_array(time, h_0.dtype).unstack(z) for z in (z_i, z_f, z_o, z_c)]
        kept = None if mask is None else mask[:, :, None]

        def step(t, h, c, *written):
            z_i, z_f, z_o, z_c = (array.read(t) for array in z)
            i = tf.sigmoid(z_i + tf.matmul(h, W_h[0]))
            f = tf.sigmoid(z_f + tf.matmul(h, W_h[1]))
            o = tf.sigmoid(z_o + tf.matmul(h, W_h[2]))
            c_tilde = tf.tanh(z_c + tf.matmul(h, W_h[3]))
            c_new = f * c + i * c_tilde
            h_new = o * tf.tanh(c_new)
            if kept is not None:
                c_new = tf.where(kept[t], c_new, c)
                h_new = tf.where(kept[t], h_new, h)
            values = (i, f, o, c_tilde, c_new, h_new)
            written = (w.write(t, v) for w, v in zip(written, values, strict=True))
            return t + 1, h_new, c_new, *written

        empty = [_array(time, h_0.dtype, h_0.shape) for _ in range(6)]
        # No `maximum_iterations` here: tf2onnx does not get along with it.
        _, h, c, *written = tf.while_loop(
            lambda t, *_: t < time, step, (tf.constant(0), h_0, c_0, *empty)
        )
        i, f, o, c_tilde, c_all, h_all = (array.stack() for array in written)

        def backward(dh_all, dh_last, dc_last):
            c_before = tf.concat([c_0[None], c_all[:-1]], 0)
            h_before = tf.concat([h_0[None], h_all[:-1]], 0)
            tanh_c = tf.tanh(c_all)
            # What dc and dh are multiplied by, for all steps at once.
            to_z = [
                _sigmoid_grad(i, c_tilde),
                _sigmoid_grad(f, c_before),
                _sigmoid_grad(o, tanh_c),
                _tanh_grad(c_tilde, i),
            ]
            to_c, through_c = _tanh_grad(tanh_c, o), f
            if kept is not None:
                share = tf.cast(kept, h_0.dtype)
                to_z = [factor * share for factor in to_z]
                to_c, through_c = to_c * share, tf.where(kept, f, 1)
            factors = [
                _array(time, h_0.dtype).unstack(factor)
                for factor in (dh_all, *to_z, to_c, through_c)
            ]
            W_hi, W_hf, W_ho, W_hc = (tf.transpose(W) for W in W_h)

            def step_back(t, dh, dc, *written):
                dh_out, to_i, to_f, to_o, to_c_tilde, to_c, through_c = (
                    array.read(t) for array in factors
                )
                dh += dh_out
                dc += dh * to_c
                dz_i, dz_f, dz_o, dz_c = (
                    dc * to_i,
                    dc * to_f,
                    dh * to_o,
                    dc * to_c_tilde,
                )
                dh_before = (tf.matmul(dz_i, W_hi) + tf.matmul(dz_f, W_hf)) + (
                    tf.matmul(dz_o, W_ho) + tf.matmul(dz_c, W_hc)
                )
                if kept is not None:
                    dh_before += tf.where(kept[t], tf.zeros_like(dh), dh)
                values = (dz_i, dz_f, dz_o, dz_c)
                written = (w.write(t, v) for w, v in zip(written, values, strict=True))
                return t - 1, dh_before, dc * through_c, *written

            empty = [_array(time, h_0.dtype, h_0.shape) for _ in range(4)]
            _, dh_0, dc_0, *written = tf.while_loop(
                lambda t, *_: t >= 0,
                step_back,
                (time - 1, dh_last, dc_last, *empty),
                maximum_iterations=time,
            )
            dz = [array.stack() for array in written]
            units = h_0.shape[-1]
            rows = tf.reshape(h_before, (-1, units))
            dW_h = [
                tf.matmul(rows, tf.reshape(dz_gate, (-1, units)), transpose_a=True)
                for dz_gate in dz
            ]
            return *dz, dh_0, dc_0, *dW_h

        return (h_all, h, c), backward

    return recurrence


def _array(time, dtype, shape=None):
    return tf.TensorArray(dtype, time, element_shape=shape)


def _sigmoid_grad(y, dy):
    return tf.raw_ops.SigmoidGrad(y=y, dy=dy)


def _tanh_grad(y, dy):
    return tf.raw_ops.TanhGrad(y=y, dy=dy)
