"""Export to LiteRT and LiteRT Micro, with one fused op per LSTM and direction."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from keras_scratch_lstm import _keras, recurrence
from keras_scratch_lstm import _validation as validation
from keras_scratch_lstm._types import Data, Model
from keras_scratch_lstm.convert import to_scratch

_HIDDEN_STATE, _CELL_STATE, _HIDDEN = 18, 19, 4  # inputs and intermediate of the op
_COMPARED = 20  # invocations, at most


@dataclass(frozen=True)
class LiteRTFile:
    """What `export_litert` wrote. `print(file)` shows a summary.

    Attributes:
        path: Path of the file.
        size: Its size in bytes.
        operators: Names of its operators.
        largest_difference: Largest difference of its outputs from the model's.
        micro: Calls that register the operators in LiteRT Micro, such as
            `"AddReshape()"`. Empty if LiteRT Micro does not run the file.
    """

    path: Path
    size: int
    operators: tuple[str, ...]
    largest_difference: float
    micro: tuple[str, ...]

    def __str__(self) -> str:
        needs = "float32 or int8, without Embedding (SELECT) and loops (WHILE)"
        return (
            f"{self.path}: {self.size / 1000:.1f} kB, "
            f"largest difference from the model {self.largest_difference:.1e}\n"
            f"operators: {', '.join(self.operators)}\n"
            f"LiteRT Micro: {', '.join(self.micro) or f'no, it needs {needs}'}"
        )


def export_litert(
    model: Model,
    path: str | os.PathLike[str],
    *,
    input_shape: Sequence[Any] | None = None,
    quantize: Literal["float16", "dynamic", "int8"] | None = None,
    representative_data: Data = None,
    io_dtype: Literal["float32", "int8"] = "float32",
    verbose: bool = True,
) -> LiteRTFile:
    """Write a LiteRT file in which each LSTM is a fused op, and check its outputs.

    Each `ScratchLSTM` and `keras.layers.LSTM` becomes one op per direction, which also
    LiteRT Micro supports. The op keeps its states between invocations. Before each new
    sequence, call `interpreter.reset_all_variables()`, or `Reset()` in LiteRT Micro.

    Args:
        model: A built model, on the TensorFlow backend.
        path: Path of the file to write.
        input_shape: Shape with batch size and time steps, such as `(1, 100, 8)`, or a
            list of shapes. Default: batch size 1, and the other sizes of
            `representative_data` or else of the model's inputs.
        quantize: `"float16"` or `"dynamic"` (weights in float16 or int8), `"int8"`
            (weights and activations), or `None`. Default: `None`.
        representative_data: Typical inputs, as for `model.predict`. Required for
            `"int8"`. Default: random numbers, for the check.
        io_dtype: Dtype of inputs and outputs, `"float32"`, or `"int8"` with
            `quantize="int8"`. Default: `"float32"`.
        verbose: Boolean, whether to print progress and a summary. Default: `True`.

    Returns:
        A `LiteRTFile`.

    Raises:
        ValueError: If an argument is invalid, or an LSTM has no fused op (custom gates,
            a mask, initial or returned states, mixed precision).
    """
    path = validation.path("path", path)
    _check_arguments(model, quantize, representative_data, io_dtype)
    if any(isinstance(part, keras.layers.LSTM) for part in _keras.all_layers(model)):
        model = to_scratch(model)
    data = _arrays(representative_data)
    signature = _signature(model, input_shape, data)
    batches = _batches(signature, data)
    report = print if verbose else str
    report(f"Converting `{model.name}` ({quantize or 'float32'})")
    content = _convert(model, signature, quantize, batches, io_dtype)
    content, operators = _repair(content)
    path.write_bytes(content)
    report(f"Comparing {len(batches[:_COMPARED])} outputs with the model's")
    difference = _largest_difference(model, content, batches[:_COMPARED])
    fails_on_micro = quantize in ("float16", "dynamic") or (
        "SELECT" in operators or "WHILE" in operators
    )
    micro = () if fails_on_micro else tuple(map(_registration, operators))
    file = LiteRTFile(path, len(content), operators, difference, micro)
    report(file)
    return file


def _check_arguments(model, quantize, data, io_dtype):
    if (backend := keras.backend.backend()) != "tensorflow":
        raise ValueError(
            f"`export_litert` requires KERAS_BACKEND=tensorflow. Received: {backend}. "
            "Save the model, and load it on TensorFlow."
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise validation.invalid("model", model, "a built model")
    if quantize not in (None, "float16", "dynamic", "int8"):
        rule = "None, 'float16', 'dynamic' or 'int8'"
        raise validation.invalid("quantize", quantize, rule)
    if io_dtype not in ("float32", quantize if quantize == "int8" else "float32"):
        rule = "'float32', or 'int8' with quantize='int8'"
        raise validation.invalid("io_dtype", io_dtype, rule)
    if quantize == "int8" and data is None:
        raise validation.invalid("representative_data", data, "an array for int8")


def _arrays(data):
    """A flat list of arrays, which is empty for `None`."""
    data = [] if data is None else keras.tree.flatten(data)
    arrays = [validation.to_numpy(value) for value in data]
    return [x.astype("float32") if x.dtype == "float64" else x for x in arrays]


def _signature(model, input_shape, data):
    """A `tf.TensorSpec` of fixed shape for each input."""
    import tensorflow as tf

    inputs = getattr(model, "inputs", None) or data
    if input_shape is None:
        shapes = [(1, *value.shape[1:]) for value in data or inputs]
    else:
        is_nested = any(isinstance(size, (tuple, list)) for size in input_shape)
        shapes = list(input_shape) if is_nested else [input_shape]
    dtypes = [keras.backend.standardize_dtype(value.dtype) for value in inputs]
    dtypes = dtypes or ["float32"] * len(shapes)  # of a model of its own class
    if not shapes or len(shapes) != len(dtypes) or not all(map(all, shapes)):
        rule = f"{len(dtypes)} fixed shape(s), such as (1, 100, 8)"
        raise validation.invalid("input_shape", input_shape, rule)
    names = [f"input_{k}" for k in range(len(shapes))]
    return list(map(tf.TensorSpec, shapes, dtypes, names))


def _batches(signature, data):
    """The inputs of each invocation, as dicts of name to array."""
    shapes = [tuple(spec.shape) for spec in signature]
    dtypes = [spec.dtype.as_numpy_dtype for spec in signature]
    size, rng = shapes[0][0], np.random.default_rng(0)
    if not data:  # integers are 0, which is a valid index
        scales = [float(spec.dtype.is_floating) for spec in signature]
        sizes = [(_COMPARED * size, *shape[1:]) for shape in shapes]
        data = list(map(rng.normal, [0.0] * len(scales), scales, sizes))
    count = min(map(len, data)) // size
    if not count or [x.shape[1:] for x in data] != [shape[1:] for shape in shapes]:
        rule = f"arrays for inputs of the shapes {shapes}"
        raise validation.invalid("representative_data", data, rule)
    data = [x.astype(dtype) for x, dtype in zip(data, dtypes, strict=True)]
    return [
        {f"input_{n}": x[k * size : (k + 1) * size] for n, x in enumerate(data)}
        for k in range(count)
    ]


def _call(model, inputs):
    """The model's outputs for a flat list of inputs, in a flat list."""
    structure = getattr(model, "input", None)  # of a Functional model
    if structure is not None:
        inputs = keras.tree.pack_sequence_as(structure, inputs)
    elif len(inputs) == 1:
        (inputs,) = inputs
    return keras.tree.flatten(model(inputs))


def _convert(model, signature, quantize, batches, io_dtype):
    import tensorflow as tf

    @tf.function(autograph=False, input_signature=signature)
    def serve(*inputs):
        outputs = enumerate(_call(model, list(inputs)))
        return {f"output_{k}": output for k, output in outputs}

    with recurrence.force("litert"):
        function = serve.get_concrete_function()
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    if quantize == "int8" and any(node.op.endswith("While") for node in nodes):
        raise ValueError(
            "`model` must have no loop for int8, or TensorFlow crashes. Received: a "
            "model with recurrent layers other than LSTM. Set `unroll=True`."
        )
    owner = tf.Module()
    owner.variables_of_function = function.variables
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], owner)
    converter.optimizations = [tf.lite.Optimize.DEFAULT] if quantize else []
    # The new quantizer leaves the op in float32.
    converter.experimental_new_dynamic_range_quantizer = quantize != "dynamic"
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: batches
        converter.inference_input_type = tf.as_dtype(io_dtype)
        converter.inference_output_type = tf.as_dtype(io_dtype)
    with warnings.catch_warnings():  # TensorFlow calibrates with its old interpreter
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprec")
        return converter.convert()


def _repair(content):
    """Restore the order of inputs and outputs, and correct the fused ops.

    Returns:
        The file's content, and the names of its operators.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    file = flatbuffer_utils.convert_bytearray_to_object(content)
    (signature,), operators = file.signatureDefs, set()
    main = file.subgraphs[signature.subgraphIndex]
    main.inputs, main.outputs = (
        [x.tensorIndex for x in sorted(side, key=lambda x: int(x.name.split(b"_")[1]))]
        for side in (signature.inputs, signature.outputs)
    )
    for graph in file.subgraphs:
        for op in graph.operators:
            operators.add(name := flatbuffer_utils.opcode_to_name(file, op.opcodeIndex))
            if name == "UNIDIRECTIONAL_SEQUENCE_LSTM":
                _correct(op, graph.tensors)
    return flatbuffer_utils.convert_object_to_bytearray(file), tuple(sorted(operators))


def _correct(op, tensors):
    op.builtinOptions.cellClip = 0.0  # the converter clips cell states to [-10, 10]
    quantization = tensors[op.inputs[_CELL_STATE]].quantization
    if quantization is None or quantization.scale is None:
        return
    # 16 bits for [-1, 1] at least: the op's `tanh` supports no smaller range.
    quantization.scale = np.maximum(quantization.scale, 2.0**-15)
    # A concatenation rescales the output, but not the hidden state that is fed back.
    for index in (op.inputs[_HIDDEN_STATE], op.intermediates[_HIDDEN]):
        tensors[index].quantization = tensors[op.outputs[0]].quantization


def _largest_difference(model, content, batches):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tensorflow.lite import Interpreter
    interpreter, largest = Interpreter(model_content=content), 0.0
    interpreter.allocate_tensors()
    for batch in batches:
        interpreter.reset_all_variables()
        inputs = list(batch.values())
        for details, x in zip(interpreter.get_input_details(), inputs, strict=True):
            scale, zero = details["quantization"]
            if scale:
                x = np.clip(np.round(x / scale) + zero, -128, 127)
            interpreter.set_tensor(details["index"], x.astype(details["dtype"]))
        interpreter.invoke()
        expected = _call(model, inputs)
        for details, y in zip(interpreter.get_output_details(), expected, strict=True):
            scale, zero = details["quantization"]
            output = interpreter.get_tensor(details["index"]).astype("float32")
            output = (output - zero) * (scale or 1)
            largest = max(largest, float(np.abs(output - np.asarray(y)).max()))
    return largest


def _registration(operator):
    """The call of `MicroMutableOpResolver` for an operator."""
    words = operator.split("_")
    words = [word if word in ("LSTM", "2D") else word.capitalize() for word in words]
    return f"Add{''.join(words)}()"
