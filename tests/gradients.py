"""Gradients on the current backend."""

import contextlib

import keras

BACKEND = keras.backend.backend()

if BACKEND == "torch":
    import torch

    # For tensors as small as those of tests, threads cost more than they save.
    torch.set_num_threads(1)


def double_precision():
    """Context manager in which the backend computes in float64."""
    if BACKEND != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


def with_gradients(function, variables):
    """Wrap a function to return its outputs and the gradients of its loss.

    Args:
        function: Function of tensors that returns `(loss, outputs)`.
        variables: The Keras variables to differentiate by.

    Returns:
        Function of tensors or arrays that returns `(outputs, gradients)` in NumPy:
        the gradients by the variables, then those by the tensors. It is compiled on
        JAX and runs eagerly elsewhere.
    """
    prepare = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND]
    run = prepare(function, list(variables))

    def evaluate(*tensors):
        results = run([keras.ops.convert_to_tensor(tensor) for tensor in tensors])
        return keras.tree.map_structure(keras.ops.convert_to_numpy, results)

    return evaluate


def _tensorflow(function, variables):
    import tensorflow as tf

    def run(tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            loss, outputs = function(*tensors)
        sources = [*(variable.value for variable in variables), *tensors]
        return outputs, tape.gradient(loss, sources, unconnected_gradients="zero")

    return run


def _jax(function, variables):
    import jax

    def pure(values, tensors):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return function(*tensors)

    gradient = jax.grad(pure, argnums=(0, 1), has_aux=True)
    compiled = jax.jit(gradient)

    def run(tensors):
        values = [variable.value for variable in variables]
        (by_variables, by_tensors), outputs = compiled(values, tensors)
        return outputs, [*by_variables, *by_tensors]

    return run


def _torch(function, variables):
    def run(tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        loss, outputs = function(*tensors)
        sources = [*(variable.value for variable in variables), *tensors]
        gradients = torch.autograd.grad(loss, sources, materialize_grads=True)
        return outputs, list(gradients)

    return run


def compiled_variants(layer, xla):
    """Functions of an input that call a built layer in training, each compiled.

    Args:
        layer: A layer that has been built.
        xla: Boolean, whether to include XLA on TensorFlow.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def call(x):
            return layer(x, training=True)

        options = [{}, {"jit_compile": True}] if xla else [{}]
        return [tf.function(call, autograph=False, **each) for each in options]
    if BACKEND == "jax":
        import jax

        def call(x, state):
            with keras.StatelessScope([(layer.cell.seed_generator.state, state)]):
                return layer(x, training=True)

        def compiled(function):
            state = layer.cell.seed_generator.state
            return lambda x: jax.jit(function)(x, state.value)

        return [compiled(call), compiled(jax.checkpoint(call))]
    return []
