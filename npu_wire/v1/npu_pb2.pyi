from npu_wire.v1 import device_pb2 as _device_pb2
from npu_wire.v1 import program_pb2 as _program_pb2
from npu_wire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("fingerprint", "capabilities", "limits", "server_time_ns")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_NS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: _device_pb2.Fingerprint
    capabilities: _device_pb2.Capabilities
    limits: _device_pb2.Limits
    server_time_ns: int
    def __init__(self, fingerprint: _Optional[_Union[_device_pb2.Fingerprint, _Mapping]] = ..., capabilities: _Optional[_Union[_device_pb2.Capabilities, _Mapping]] = ..., limits: _Optional[_Union[_device_pb2.Limits, _Mapping]] = ..., server_time_ns: _Optional[int] = ...) -> None: ...

class CompileHeader(_message.Message):
    __slots__ = ("model_bytes", "ranges")
    MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    model_bytes: int
    ranges: _containers.RepeatedCompositeFieldContainer[_program_pb2.ActivationRange]
    def __init__(self, model_bytes: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[_program_pb2.ActivationRange, _Mapping]]] = ...) -> None: ...

class CompileRequest(_message.Message):
    __slots__ = ("header", "model_chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    MODEL_CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: CompileHeader
    model_chunk: bytes
    def __init__(self, header: _Optional[_Union[CompileHeader, _Mapping]] = ..., model_chunk: _Optional[bytes] = ...) -> None: ...

class CompileResponse(_message.Message):
    __slots__ = ("session_id", "profile_hash", "lease_s", "inputs", "layers", "outputs")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PROFILE_HASH_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    profile_hash: str
    lease_s: float
    inputs: _containers.RepeatedCompositeFieldContainer[_program_pb2.InputSpec]
    layers: _containers.RepeatedCompositeFieldContainer[_program_pb2.LayerSpec]
    outputs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_id: _Optional[str] = ..., profile_hash: _Optional[str] = ..., lease_s: _Optional[float] = ..., inputs: _Optional[_Iterable[_Union[_program_pb2.InputSpec, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[_program_pb2.LayerSpec, _Mapping]]] = ..., outputs: _Optional[_Iterable[str]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("session_id", "shared_memory")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    shared_memory: bool
    def __init__(self, session_id: _Optional[str] = ..., shared_memory: bool = ...) -> None: ...

class WeightUpdate(_message.Message):
    __slots__ = ("weights_version", "names")
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    weights_version: int
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, weights_version: _Optional[int] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class WeightChunk(_message.Message):
    __slots__ = ("weights_version", "small", "chunk")
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    SMALL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    weights_version: int
    small: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.TensorChunk]
    chunk: _tensor_pb2.TensorChunk
    def __init__(self, weights_version: _Optional[int] = ..., small: _Optional[_Iterable[_Union[_tensor_pb2.TensorChunk, _Mapping]]] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ...) -> None: ...

class BatchChunk(_message.Message):
    __slots__ = ("batch_id", "weights_version", "chunk", "taps")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TAPS_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    weights_version: int
    chunk: _tensor_pb2.TensorChunk
    taps: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, batch_id: _Optional[int] = ..., weights_version: _Optional[int] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., taps: _Optional[_Iterable[int]] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("attach", "update", "weight", "batch")
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    attach: Attach
    update: WeightUpdate
    weight: WeightChunk
    batch: BatchChunk
    def __init__(self, attach: _Optional[_Union[Attach, _Mapping]] = ..., update: _Optional[_Union[WeightUpdate, _Mapping]] = ..., weight: _Optional[_Union[WeightChunk, _Mapping]] = ..., batch: _Optional[_Union[BatchChunk, _Mapping]] = ...) -> None: ...

class SharedMemoryOffer(_message.Message):
    __slots__ = ("socket", "token")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    socket: str
    token: bytes
    def __init__(self, socket: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("weights_version", "shared_memory")
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    weights_version: int
    shared_memory: SharedMemoryOffer
    def __init__(self, weights_version: _Optional[int] = ..., shared_memory: _Optional[_Union[SharedMemoryOffer, _Mapping]] = ...) -> None: ...

class WeightsLoaded(_message.Message):
    __slots__ = ("duration_ns",)
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    duration_ns: int
    def __init__(self, duration_ns: _Optional[int] = ...) -> None: ...

class SharedSlice(_message.Message):
    __slots__ = ("slot", "offset", "length")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    slot: int
    offset: int
    length: int
    def __init__(self, slot: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class LayerTensor(_message.Message):
    __slots__ = ("layer", "chunk", "start_ns", "end_ns", "shared")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    END_NS_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    layer: int
    chunk: _tensor_pb2.TensorChunk
    start_ns: int
    end_ns: int
    shared: SharedSlice
    def __init__(self, layer: _Optional[int] = ..., chunk: _Optional[_Union[_tensor_pb2.TensorChunk, _Mapping]] = ..., start_ns: _Optional[int] = ..., end_ns: _Optional[int] = ..., shared: _Optional[_Union[SharedSlice, _Mapping]] = ...) -> None: ...

class BatchDone(_message.Message):
    __slots__ = ("queued_ns", "device_ns")
    QUEUED_NS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NS_FIELD_NUMBER: _ClassVar[int]
    queued_ns: int
    device_ns: int
    def __init__(self, queued_ns: _Optional[int] = ..., device_ns: _Optional[int] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("profile_hash", "weights_version", "batch_id", "attached", "weights_loaded", "tensor", "done")
    PROFILE_HASH_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_VERSION_FIELD_NUMBER: _ClassVar[int]
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_LOADED_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    profile_hash: str
    weights_version: int
    batch_id: int
    attached: Attached
    weights_loaded: WeightsLoaded
    tensor: LayerTensor
    done: BatchDone
    def __init__(self, profile_hash: _Optional[str] = ..., weights_version: _Optional[int] = ..., batch_id: _Optional[int] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., weights_loaded: _Optional[_Union[WeightsLoaded, _Mapping]] = ..., tensor: _Optional[_Union[LayerTensor, _Mapping]] = ..., done: _Optional[_Union[BatchDone, _Mapping]] = ...) -> None: ...

class KeepAliveRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class KeepAliveResponse(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
