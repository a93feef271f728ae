"""An NPU in the process of the test: the client's `Npu` protocol over a backend, and a small backend.

`SegmentBackend` runs each layer in ONNX Runtime's float kernels on dequantized INT8 inputs and rounds the
result: real INT8 tensors with real quantization noise, from an engine that shares no code with the client.
"""

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from npu_server.seam import Backend, BackendOptions, Health, LayerTensor, Program, Ranges
from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import InvalidInput, NonFiniteInput
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap, LayerSpec, MemoryLayout, TensorSpec
from npu_wire.quantize import dequantize, quantize
from trainer_client.npu.session import LayerTiming

_LAYER_ENDS = ("Relu", "Clip", "Add", "ReduceMean", "Gemm")


class InProcessNpu:
    """`Npu` over a backend, without a network; keeps what was pushed and submitted for the tests to see."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.sessions: list[InProcessSession] = []

    @property
    def info(self) -> Capabilities:
        return self._backend.open()

    def compile(self, model: bytes, ranges: Ranges) -> "InProcessSession":
        self.sessions.append(InProcessSession(self._backend.compile(model, ranges)))
        return self.sessions[-1]

    def close(self) -> None:
        for session in self.sessions:
            session.close()


class InProcessSession:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.pushes: list[Mapping[str, Float32Array]] = []
        self.batches: list[tuple[Mapping[str, Array], tuple[int, ...]]] = []
        self.closed = False

    @property
    def layer_map(self) -> LayerMap:
        return self.program.layer_map

    def push_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        self.program.load_weights(tensors)
        self.pushes.append(tensors)

    def submit(self, inputs: Mapping[str, Array], taps: Collection[int]) -> "InProcessBatch":
        self.batches.append((inputs, tuple(taps)))
        return InProcessBatch([t for t in self.program.forward(inputs, taps) if t is not None])

    def close(self) -> None:
        self.closed = True
        self.program.close()


class InProcessBatch:
    def __init__(self, tensors: Sequence[LayerTensor]) -> None:
        self._tensors = {tensor.layer: tensor for tensor in tensors}

    def tensor(self, layer: int) -> Int8Array:
        return self._tensors[layer].data

    def timings(self) -> list[LayerTiming]:
        return [LayerTiming(t.layer, t.start_ns, t.end_ns, t.end_ns) for t in self._tensors.values()]


class SegmentBackend:
    """Layers end at activations, additions, means and fully connected layers; see the module's docstring."""

    def __init__(self, options: BackendOptions, layout: MemoryLayout = MemoryLayout.CHANNELS_LAST) -> None:
        self._layout = layout

    def open(self) -> Capabilities:
        fingerprint = Fingerprint(
            "segment", "test", "segment", "1", "float", hashlib.sha256(b"segment").hexdigest()
        )
        return Capabilities(fingerprint, ("Conv", *_LAYER_ENDS), max_batch=16)

    def close(self) -> None:
        pass

    def probe(self) -> Health:
        return Health(True)

    def compile(self, model: bytes, ranges: Ranges) -> "SegmentProgram":
        return SegmentProgram(onnx.load_model_from_string(model), ranges, self._layout)


class SegmentProgram:
    def __init__(self, model: onnx.ModelProto, ranges: Ranges, layout: MemoryLayout) -> None:
        self._model = model
        graph = model.graph
        self._initializers = {t.name: t for t in graph.initializer}
        self._producer = {name: node for node in graph.node for name in node.output}
        ends = [n.output[0] for n in graph.node if n.op_type in _LAYER_ENDS and self._reads_input(n)]
        self._shapes = self._infer_shapes([graph.input[0].name, *ends])
        self.quantized = {name: self._spec(name, ranges[name], layout) for name in self._shapes}
        self._segments = [self._cut(end, set(self._shapes)) for end in ends]
        self.layer_map = LayerMap(
            (self.quantized[graph.input[0].name],),
            tuple(
                self._layer(end, inputs, parameters)
                for end, (inputs, _, parameters) in zip(ends, self._segments, strict=True)
            ),
            (ends[-1],),
        )
        self._sessions = self._build()

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        for name, values in tensors.items():
            if name not in self._initializers:
                raise InvalidInput(f"unknown initializer {name!r}")
            if not np.isfinite(values).all():
                raise NonFiniteInput(name)
            self._initializers[name].CopyFrom(numpy_helper.from_array(values, name))
        self._sessions = self._build()

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor]:
        codes = dict(inputs)
        for position, layer in enumerate(self.layer_map.layers):
            start = time.monotonic_ns()
            feeds = {
                name: dequantize(codes[name], self.quantized[name].scale, self.quantized[name].zero_point)
                for name in layer.inputs
            }
            (value,) = self._sessions[position].run([layer.name], feeds)
            q = quantize(np.asarray(value, np.float32), layer.output.scale, layer.output.zero_point)
            if layer.output.layout is MemoryLayout.CHANNELS_LAST:
                q = np.ascontiguousarray(q.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            codes[layer.name] = q
            if position in taps or position in self.layer_map.output_layers:
                yield LayerTensor(position, q, start, time.monotonic_ns())

    def close(self) -> None:
        pass

    def _reads_input(self, node: onnx.NodeProto) -> bool:
        names, seen = list(node.input), set()
        while names:
            name = names.pop()
            if name == self._model.graph.input[0].name:
                return True
            if name in self._producer and name not in seen:
                seen.add(name)
                names += self._producer[name].input
        return False

    def _infer_shapes(self, names: list[str]) -> dict[str, tuple[int, ...]]:
        inferred = onnx.shape_inference.infer_shapes(self._model).graph
        shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim[1:])
            for v in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        return {name: shapes[name] for name in names}

    def _spec(self, name: str, bounds: tuple[float, float], layout: MemoryLayout) -> TensorSpec:
        low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
        scale = float(np.float32((high - low) / 255))
        shape = self._shapes[name]
        kind = layout if len(shape) == 3 else MemoryLayout.CONTIGUOUS
        return TensorSpec(name, shape, scale, round(-128 - low / scale), kind)

    def _layer(self, end: str, inputs: tuple[str, ...], parameters: tuple[str, ...]) -> LayerSpec:
        op = self._producer[end].op_type
        return LayerSpec(
            self.quantized[end],
            op,
            inputs,
            parameters=parameters,
            saturation_low=-129 if op in ("Relu", "Clip") else -128,
            saturation_high=128 if op == "Clip" else 127,
        )

    def _cut(
        self, end: str, boundary: set[str]
    ) -> tuple[tuple[str, ...], list[onnx.NodeProto], tuple[str, ...]]:
        inputs: dict[str, None] = {}
        wanted: set[str] = {end}
        parameters: dict[str, None] = {}
        for node in reversed(self._model.graph.node):
            if wanted & set(node.output):
                for name in node.input:
                    if name in boundary:
                        inputs[name] = None
                    elif name in self._initializers:
                        parameters[name] = None
                    else:
                        wanted.add(name)
        nodes = [n for n in self._model.graph.node if wanted & set(n.output)]
        return tuple(inputs), nodes, tuple(parameters)

    def _build(self) -> list[onnxruntime.InferenceSession]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        sessions = []
        for layer, (inputs, nodes, parameters) in zip(self.layer_map.layers, self._segments, strict=True):
            value = onnx.helper.make_tensor_value_info
            graph = onnx.helper.make_graph(
                nodes,
                layer.name,
                [value(name, onnx.TensorProto.FLOAT, ["n", *self._shapes[name]]) for name in inputs],
                [value(layer.name, onnx.TensorProto.FLOAT, None)],
                [self._initializers[name] for name in parameters],
            )
            model = onnx.helper.make_model(
                graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
            )
            sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options))
        return sessions
