"""The layer map: what a compiled program tells about its INT8 tensors."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_wire.v1 import program_pb2, tensor_pb2

INT8_MIN, INT8_MAX = -128, 127

Int8Array = npt.NDArray[np.int8]
Float32Array = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

WIRE_TYPES: dict[np.dtype[Any], tensor_pb2.DataType] = {
    np.dtype(np.int8): tensor_pb2.DATA_TYPE_INT8,
    np.dtype(np.float32): tensor_pb2.DATA_TYPE_FLOAT32,
    np.dtype(np.float16): tensor_pb2.DATA_TYPE_FLOAT16,
    np.dtype(np.float64): tensor_pb2.DATA_TYPE_FLOAT64,
    np.dtype(np.bool_): tensor_pb2.DATA_TYPE_BOOL,
    np.dtype(np.uint8): tensor_pb2.DATA_TYPE_UINT8,
    np.dtype(np.int16): tensor_pb2.DATA_TYPE_INT16,
    np.dtype(np.int32): tensor_pb2.DATA_TYPE_INT32,
    np.dtype(np.int64): tensor_pb2.DATA_TYPE_INT64,
}
"""Element types that can travel; INT8 is for codes, FLOAT32 for weights, all of them for raw inputs."""
NUMPY_TYPES = {code: dtype for dtype, code in WIRE_TYPES.items()}


class MemoryLayout(enum.Enum):
    """Order of a tensor's elements in memory; shapes are always logical (batch, channel, ...)."""

    CONTIGUOUS = tensor_pb2.MEMORY_LAYOUT_CONTIGUOUS
    CHANNELS_LAST = tensor_pb2.MEMORY_LAYOUT_CHANNELS_LAST


@dataclass(frozen=True)
class TensorSpec:
    """One INT8 tensor: real = (q - zero_point) * scale.

    Attributes:
        name: ONNX value name.
        shape: logical shape without the batch dimension.
        scale: real value of one LSB, a float32 number > 0.
        zero_point: code of real 0, in [-128, 127].
        layout: order of the elements in which it travels.
        outer: elements before the batch in the ONNX value's own order, (outer, batch, rest); 1 where it
            begins with the batch, as the tensor here always does.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    layout: MemoryLayout = MemoryLayout.CONTIGUOUS
    outer: int = 1


@dataclass(frozen=True)
class RawSpec:
    """An input that travels as it is: only the NPU's host computes with it.

    Attributes:
        name: ONNX value name.
        shape: logical shape; without the batch dimension where it is batched.
        dtype: element type, a key of `WIRE_TYPES`.
        batched: whether the tensor begins with the batch dimension.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    batched: bool = True


InputSpec = TensorSpec | RawSpec


@dataclass(frozen=True)
class LayerSpec:
    """One layer as the NPU executes it.

    Attributes:
        output: the INT8 tensor that the layer yields.
        op: operator of the layer: "Conv", "Gemm", "Add", "Lut", ...
        inputs: names of the INT8 tensors, and of the raw inputs, that it consumes.
        fused_nodes: names of the ONNX nodes that it stands for.
        parameters: names of the initializers that its weights derive from.
        saturation_low: largest code that counts as clipped from below; -129 where an activation bounds it.
        saturation_high: smallest code that counts as clipped from above; 128 where an activation bounds it.
        moves_data_only: True when the output carries no new quantization noise (max pool, reshape, ...).
        host_reason: why the NPU's host computes it in floating point (a softmax on many NPUs, an LSTM); empty
            where the NPU computes it.
        macs: multiply-accumulates for one sample.
        never_overflows: True when, whatever the weights and the inputs, no register inside the layer
            overflows: a code is the real value rounded, or clipped. False where nobody knows.
    """

    output: TensorSpec
    op: str
    inputs: tuple[str, ...]
    fused_nodes: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    saturation_low: int = INT8_MIN
    saturation_high: int = INT8_MAX
    moves_data_only: bool = False
    host_reason: str = ""
    macs: int = 0
    never_overflows: bool = False

    @property
    def name(self) -> str:
        """ONNX value name of the output."""
        return self.output.name

    @property
    def host_float(self) -> bool:
        """Whether the NPU's host computes it: its bits are the runtime's then, not the chip's."""
        return bool(self.host_reason)


@dataclass(frozen=True)
class LayerMap:
    """What goes into a compiled program, what it computes, and what it is for.

    Attributes:
        inputs: in the model's order; those that no layer needs are not among them.
        layers: in the order of execution; each yields one INT8 tensor.
        outputs: names of the INT8 tensors, of layers or inputs, from which the model's outputs follow.
    """

    inputs: tuple[InputSpec, ...]
    layers: tuple[LayerSpec, ...]
    outputs: tuple[str, ...]

    @cached_property
    def output_layers(self) -> frozenset[int]:
        """Positions of the layers that every batch is answered with."""
        return frozenset(i for i, layer in enumerate(self.layers) if layer.name in self.outputs)

    @property
    def quantized_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that travel as INT8 codes."""
        return tuple(spec for spec in self.inputs if isinstance(spec, TensorSpec))

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every INT8 tensor by name: quantized inputs and the layers' outputs."""
        return {spec.name: spec for spec in (*self.quantized_inputs, *(x.output for x in self.layers))}

    def named(self, *arrays: Array) -> dict[str, Array]:
        """The inputs' values, given in the map's order, by name."""
        return {spec.name: array for spec, array in zip(self.inputs, arrays, strict=True)}

    @property
    def arithmetic(self) -> "LayerMap":
        """The map without the order of elements in memory: equal where two programs compute the same."""

        def contiguous(spec: TensorSpec) -> TensorSpec:
            return replace(spec, layout=MemoryLayout.CONTIGUOUS)

        inputs = tuple(contiguous(x) if isinstance(x, TensorSpec) else x for x in self.inputs)
        layers = tuple(replace(layer, output=contiguous(layer.output)) for layer in self.layers)
        return LayerMap(inputs, layers, self.outputs)


def tensor_spec_to_proto(spec: TensorSpec) -> program_pb2.TensorSpec:
    """Encodes a tensor spec."""
    return program_pb2.TensorSpec(
        name=spec.name,
        shape=spec.shape,
        layout=spec.layout.value,
        scale=spec.scale,
        zero_point=spec.zero_point,
        outer=spec.outer,
    )


def tensor_spec_from_proto(message: program_pb2.TensorSpec) -> TensorSpec:
    """Decodes a tensor spec."""
    return TensorSpec(
        name=message.name,
        shape=tuple(message.shape),
        scale=message.scale,
        zero_point=message.zero_point,
        layout=MemoryLayout(message.layout),
        outer=message.outer or 1,
    )


def input_spec_to_proto(spec: InputSpec) -> program_pb2.InputSpec:
    """Encodes the spec of an input."""
    if isinstance(spec, TensorSpec):
        return program_pb2.InputSpec(quantized=tensor_spec_to_proto(spec))
    raw = program_pb2.RawSpec(
        name=spec.name, shape=spec.shape, dtype=WIRE_TYPES[spec.dtype], batched=spec.batched
    )
    return program_pb2.InputSpec(raw=raw)


def input_spec_from_proto(message: program_pb2.InputSpec) -> InputSpec:
    """Decodes the spec of an input."""
    if message.WhichOneof("kind") == "quantized":
        return tensor_spec_from_proto(message.quantized)
    raw = message.raw
    return RawSpec(raw.name, tuple(raw.shape), NUMPY_TYPES[raw.dtype], raw.batched)


def layer_spec_to_proto(spec: LayerSpec) -> program_pb2.LayerSpec:
    """Encodes a layer spec."""
    return program_pb2.LayerSpec(
        output=tensor_spec_to_proto(spec.output),
        op=spec.op,
        inputs=spec.inputs,
        fused_nodes=spec.fused_nodes,
        parameters=spec.parameters,
        saturation_low=spec.saturation_low,
        saturation_high=spec.saturation_high,
        moves_data_only=spec.moves_data_only,
        host_reason=spec.host_reason,
        macs=spec.macs,
        never_overflows=spec.never_overflows,
    )


def layer_spec_from_proto(message: program_pb2.LayerSpec) -> LayerSpec:
    """Decodes a layer spec."""
    return LayerSpec(
        output=tensor_spec_from_proto(message.output),
        op=message.op,
        inputs=tuple(message.inputs),
        fused_nodes=tuple(message.fused_nodes),
        parameters=tuple(message.parameters),
        saturation_low=message.saturation_low,
        saturation_high=message.saturation_high,
        moves_data_only=message.moves_data_only,
        host_reason=message.host_reason,
        macs=message.macs,
        never_overflows=message.never_overflows,
    )
