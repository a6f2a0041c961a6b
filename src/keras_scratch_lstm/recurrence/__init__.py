"""Fast implementations of the LSTM over a whole sequence, one module per backend.

Every module implements one contract:

    lstm(x, h, c, W_x, W_h, b, mask, training) -> (h_all, h, c)

- `x`: input sequence of shape `(time, batch, features)`.
- `h`, `c`: initial states, each of shape `(batch, units)`.
- `W_x`, `W_h`, `b`: weights per gate, four tensors each in the order i, f, o, c, of
  shapes `(features, units)`, `(units, units)` and `(units,)`. `b` may be
  `None`.
- `mask`: Boolean tensor of shape `(time, batch)`, or `None`. A masked time step leaves
  `h` and `c` unchanged.
- `training`: Boolean. If `True`, TensorFlow unrolls the loop; other backends ignore it.

It returns the hidden states of all time steps, `(time, batch, units)`, and the last `h`
and `c`. The activations are sigmoid and tanh. For leading masked time steps, it returns
what Keras does on the backend: zeros on TensorFlow and torch, the initial `h` on JAX.

Where a module has `lstm_in_cudnn`, it has the same contract. An implementation raises
`NotImplementedError` for what it does not support. The layer then tries the next one,
and at last runs the reference loop of `keras.layers.RNN`, with which the tests compare
all others. Nothing here depends on layers or variables.
"""

import contextlib
import importlib
import threading

import keras
from keras import ops

_forced = threading.local()  # not a `ContextVar`, which `torch.compile` cannot trace

# The module of the backend, if it has one. Imported once: `torch.compile` traces calls.
_NAME = keras.backend.backend()
_MODULE = None
if _NAME in ("tensorflow", "jax", "torch"):
    _MODULE = importlib.import_module(f"{__name__}.{_NAME}")

# On torch, those of `keras.ops` take several times as long, which counts in a loop.
stack = getattr(_MODULE, "stack", ops.stack)
where = getattr(_MODULE, "where", ops.where)


def implementations(use_cudnn="auto"):
    """The implementations for this backend and its devices, the preferred one first.

    Returns:
        Dict of name to function `lstm`. The reference loop, `"loop"`, is not in it,
        since it belongs to the layer.
    """
    if _MODULE is None:
        return {}
    if forced() == "litert":
        return {"litert": importlib.import_module(f"{__name__}.litert").lstm}
    found = {}
    if use_cudnn and hasattr(_MODULE, "lstm_in_cudnn") and _MODULE.has_gpu():
        found["cudnn"] = _MODULE.lstm_in_cudnn
    if use_cudnn is not True:
        found[_NAME] = _MODULE.lstm
    return {name: found[name] for name in found if forced() in (None, name)}


@contextlib.contextmanager
def force(name):
    """Context manager that restricts this thread to one implementation.

    Args:
        name: `"loop"` (the reference loop), `"tensorflow"`, `"jax"`, `"torch"` or
            `"cudnn"`. Where that one does not apply, the reference loop runs.
            `"litert"` is the fused op of an exported LiteRT model; where it does not
            apply, the layer raises an error.
    """
    before = forced()
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def forced():
    """The name passed to `force`, or `None`."""
    return getattr(_forced, "name", None)


def supports_jit(use_cudnn="auto"):
    """Whether XLA can compile a model that runs `implementations(use_cudnn)`."""
    return not (_NAME == "tensorflow" and use_cudnn and _MODULE.has_gpu())


def gradient(function, tensors):
    """Differentiate a scalar function of a list of tensors.

    Args:
        function: Function of one argument, a list of tensors.
        tensors: List of arrays or tensors.

    Returns:
        List of tensors, zeros where the function does not depend on a tensor.
    """
    if _MODULE is None:
        raise NotImplementedError(
            "Gradients need the TensorFlow, JAX or PyTorch backend. Received: "
            f"KERAS_BACKEND={_NAME}"
        )
    return _MODULE.gradient(function, [ops.convert_to_tensor(x) for x in tensors])


def no_gradients():
    """Context manager without the bookkeeping of gradients, which torch has."""
    return getattr(_MODULE, "no_gradients", contextlib.nullcontext)()


def compiled(function):
    """Compile a function of nested tensors.

    On torch and backends for inference only, this returns the function.
    """
    return getattr(_MODULE, "compiled", _identity)(function)


def random_uniform(shape, seed_generator):
    """Draw numbers in [0, 1) that depend on the seed alone, compiled by XLA or not.

    On TensorFlow, `keras.random.uniform` draws other numbers when compiled by XLA.
    """
    draw = getattr(_MODULE, "random_uniform", keras.random.uniform)
    return draw(shape, seed=seed_generator)


def copies(states):
    """Copies of state variables, which may be assigned before the backward pass."""
    return getattr(_MODULE, "copies", _copies)(states)


def _copies(states):
    return [ops.copy(state) for state in states]


def is_compiled():
    """Whether `compiled` compiles on this backend."""
    return hasattr(_MODULE, "compiled")


def scan(body, carry, xs, like):
    """Run `carry, ys = body(carry, xs[t])` for every time step.

    Args:
        body: Function `(carry, x)` that returns a new carry and a dict of tensors.
        carry: Nested tensors.
        xs: Dict of tensors of shape `(time, ...)`; `None` is passed on.
        like: Dict of tensors with the shapes and dtypes of those that `body` returns.

    Returns:
        The last carry, and a dict of the tensors of all time steps, `(time, ...)`.
    """
    return getattr(_MODULE, "scan", _scan)(body, carry, xs, like)


def _scan(body, carry, xs, like):
    # Slices of one tensor would each have a gradient of its full size.
    steps = {name: x if x is None else ops.unstack(x) for name, x in xs.items()}
    time = next(len(x) for x in steps.values() if x is not None)
    stacked = {name: [] for name in like}
    for t in range(time):
        now = {name: x if x is None else x[t] for name, x in steps.items()}
        carry, ys = body(carry, now)
        for name, values in stacked.items():
            values.append(ys[name])
    return carry, {name: stack(values) for name, values in stacked.items()}


def repeat_masked_outputs(outputs, mask):
    """Repeat the previous output at masked time steps, where Keras's loop does not.

    Args:
        outputs: Outputs of the reference loop, of shape `(batch, time, size)`.
        mask: Boolean tensor of shape `(batch, time)`.
    """
    return getattr(_MODULE, "repeat_masked_outputs", _identity)(outputs, mask)


def _identity(value, *_):
    return value
