"""The layer map: what a compiled program tells about its INT8 tensors."""

import enum
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from npu_wire.v1 import program_pb2, tensor_pb2

INT8_MIN, INT8_MAX = -128, 127

Int8Array = npt.NDArray[np.int8]
Float32Array = npt.NDArray[np.float32]


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
class LayerSpec:
    """One layer as the NPU executes it.

    Attributes:
        output: the INT8 tensor that the layer yields.
        op: operator of the layer: "Conv", "Gemm", "Add", "Lut", ...
        inputs: names of the INT8 tensors that it consumes.
        fused_nodes: names of the ONNX nodes that it stands for.
        parameters: names of the initializers that its weights derive from.
        saturation_low: largest code that counts as clipped from below; -129 where an activation bounds it.
        saturation_high: smallest code that counts as clipped from above; 128 where an activation bounds it.
        moves_data_only: True when the output carries no new quantization noise (max pool, reshape, ...).
        host_float: True when the NPU's host computes it in floating point (softmax, layer norm on many NPUs).
    """

    output: TensorSpec
    op: str
    inputs: tuple[str, ...]
    fused_nodes: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    saturation_low: int = INT8_MIN
    saturation_high: int = INT8_MAX
    moves_data_only: bool = False
    host_float: bool = False

    @property
    def name(self) -> str:
        """ONNX value name of the output."""
        return self.output.name


@dataclass(frozen=True)
class LayerMap:
    """All INT8 tensors of a compiled program, in the order of execution; the last layer yields the output."""

    input: TensorSpec
    layers: tuple[LayerSpec, ...]

    @property
    def output(self) -> TensorSpec:
        """The model's output."""
        return self.layers[-1].output

    @property
    def arithmetic(self) -> "LayerMap":
        """The map without the order of elements in memory: equal where two programs compute the same."""

        def contiguous(spec: TensorSpec) -> TensorSpec:
            return replace(spec, layout=MemoryLayout.CONTIGUOUS)

        layers = tuple(replace(layer, output=contiguous(layer.output)) for layer in self.layers)
        return LayerMap(contiguous(self.input), layers)


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
        host_float=spec.host_float,
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
        host_float=message.host_float,
    )
