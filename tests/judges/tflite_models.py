"""Authors .tflite models operator by operator with flatbuffers; no TensorFlow needed."""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_TYPES = {np.int8: schema.TensorType.INT8, np.int32: schema.TensorType.INT32}


class TfliteModel:
    """One subgraph of INT8 tensors."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._graph = schema.SubGraphT()
        self._graph.tensors, self._graph.operators, self._graph.inputs, self._graph.outputs = [], [], [], []
        self._graph.name = "main"
        self._model = schema.ModelT()
        self._model.version = 3
        self._model.buffers, self._model.operatorCodes = [schema.BufferT()], []
        self._model.subgraphs = [self._graph]

    def tensor(self, shape, dtype=np.int8, scale=None, zero_point=0, axis=0, data=None) -> int:
        """Adds a tensor.

        Args:
            shape: its shape.
            dtype: int8 or int32.
            scale: one number or one for each channel; None: not quantized.
            zero_point: of all channels.
            axis: of the channels.
            data: a constant's elements.
        """
        tensor, buffer = schema.TensorT(), schema.BufferT()
        tensor.shape, tensor.type, tensor.hasRank = [int(n) for n in shape], _TYPES[dtype], True
        tensor.name = f"t{len(self._graph.tensors)}"
        if data is not None:
            buffer.data = np.frombuffer(np.ascontiguousarray(data, dtype).tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        tensor.buffer = len(self._model.buffers) - 1
        if scale is not None:
            quantization = schema.QuantizationParametersT()
            quantization.scale = np.atleast_1d(np.asarray(scale, np.float32))
            quantization.zeroPoint = np.full(quantization.scale.shape, zero_point, np.int64)
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def operator(
        self, name: str, inputs: list[int], outputs: list[int], options: str, version: int, **fields
    ) -> None:
        """Adds an operator.

        Args:
            name: in `schema.BuiltinOperator`.
            inputs: tensors.
            outputs: tensors.
            options: in `schema.BuiltinOptions`; empty for an operator without.
            version: of the operator.
            fields: of the options, in the schema's spelling.
        """
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        self._model.operatorCodes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = len(self._model.operatorCodes) - 1
        operator.inputs, operator.outputs = inputs, outputs
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, options + "T")()
        for key, value in fields.items():
            setattr(operator.builtinOptions, key, value)
        self._graph.operators.append(operator)

    def finish(self, inputs: list[int], outputs: list[int]) -> bytes:
        """The model's bytes."""
        self._graph.inputs, self._graph.outputs = inputs, outputs
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
