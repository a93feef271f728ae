from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Fingerprint(_message.Message):
    __slots__ = ("backend", "vendor", "model", "firmware", "profile", "profile_hash")
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    VENDOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FIRMWARE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_HASH_FIELD_NUMBER: _ClassVar[int]
    backend: str
    vendor: str
    model: str
    firmware: str
    profile: str
    profile_hash: str
    def __init__(self, backend: _Optional[str] = ..., vendor: _Optional[str] = ..., model: _Optional[str] = ..., firmware: _Optional[str] = ..., profile: _Optional[str] = ..., profile_hash: _Optional[str] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("operators", "max_batch", "deterministic", "concurrency", "location", "failed_kernels", "kernels")
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    FAILED_KERNELS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    operators: _containers.RepeatedScalarFieldContainer[str]
    max_batch: int
    deterministic: bool
    concurrency: int
    location: str
    failed_kernels: _containers.RepeatedScalarFieldContainer[str]
    kernels: str
    def __init__(self, operators: _Optional[_Iterable[str]] = ..., max_batch: _Optional[int] = ..., deterministic: bool = ..., concurrency: _Optional[int] = ..., location: _Optional[str] = ..., failed_kernels: _Optional[_Iterable[str]] = ..., kernels: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_sessions", "max_model_bytes", "max_in_flight", "lease_s", "max_session_bytes", "max_server_bytes", "stall_s")
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SERVER_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    max_sessions: int
    max_model_bytes: int
    max_in_flight: int
    lease_s: float
    max_session_bytes: int
    max_server_bytes: int
    stall_s: float
    def __init__(self, max_sessions: _Optional[int] = ..., max_model_bytes: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., lease_s: _Optional[float] = ..., max_session_bytes: _Optional[int] = ..., max_server_bytes: _Optional[int] = ..., stall_s: _Optional[float] = ...) -> None: ...
