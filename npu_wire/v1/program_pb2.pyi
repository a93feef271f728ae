from npu_wire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ActivationRange(_message.Message):
    __slots__ = ("name", "min", "max")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    name: str
    min: float
    max: float
    def __init__(self, name: _Optional[str] = ..., min: _Optional[float] = ..., max: _Optional[float] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "layout", "scale", "zero_point", "outer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    ZERO_POINT_FIELD_NUMBER: _ClassVar[int]
    OUTER_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    layout: _tensor_pb2.MemoryLayout
    scale: float
    zero_point: int
    outer: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., layout: _Optional[_Union[_tensor_pb2.MemoryLayout, str]] = ..., scale: _Optional[float] = ..., zero_point: _Optional[int] = ..., outer: _Optional[int] = ...) -> None: ...

class RawSpec(_message.Message):
    __slots__ = ("name", "shape", "dtype", "batched")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BATCHED_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: _tensor_pb2.DataType
    batched: bool
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., batched: bool = ...) -> None: ...

class InputSpec(_message.Message):
    __slots__ = ("quantized", "raw")
    QUANTIZED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    quantized: TensorSpec
    raw: RawSpec
    def __init__(self, quantized: _Optional[_Union[TensorSpec, _Mapping]] = ..., raw: _Optional[_Union[RawSpec, _Mapping]] = ...) -> None: ...

class LayerSpec(_message.Message):
    __slots__ = ("output", "op", "inputs", "fused_nodes", "parameters", "saturation_low", "saturation_high", "moves_data_only", "host_reason", "macs", "never_overflows")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    FUSED_NODES_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SATURATION_LOW_FIELD_NUMBER: _ClassVar[int]
    SATURATION_HIGH_FIELD_NUMBER: _ClassVar[int]
    MOVES_DATA_ONLY_FIELD_NUMBER: _ClassVar[int]
    HOST_REASON_FIELD_NUMBER: _ClassVar[int]
    MACS_FIELD_NUMBER: _ClassVar[int]
    NEVER_OVERFLOWS_FIELD_NUMBER: _ClassVar[int]
    output: TensorSpec
    op: str
    inputs: _containers.RepeatedScalarFieldContainer[str]
    fused_nodes: _containers.RepeatedScalarFieldContainer[str]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    saturation_low: int
    saturation_high: int
    moves_data_only: bool
    host_reason: str
    macs: int
    never_overflows: bool
    def __init__(self, output: _Optional[_Union[TensorSpec, _Mapping]] = ..., op: _Optional[str] = ..., inputs: _Optional[_Iterable[str]] = ..., fused_nodes: _Optional[_Iterable[str]] = ..., parameters: _Optional[_Iterable[str]] = ..., saturation_low: _Optional[int] = ..., saturation_high: _Optional[int] = ..., moves_data_only: bool = ..., host_reason: _Optional[str] = ..., macs: _Optional[int] = ..., never_overflows: bool = ...) -> None: ...
