"""The one error tree of both sides and its mapping to gRPC status.

    NpuError
    ├── InvalidInput            a value is wrong: shape, dtype, range, name, file        (also a ValueError)
    │   ├── InvalidModel        the bytes are not a model that can be read
    │   ├── InvalidProfile      a numerics profile that says something illegal
    │   └── NonFiniteInput      NaN or infinity where a real number is needed
    ├── MissingPackage          an extra is not installed: its install line              (also an ImportError)
    ├── UnsupportedModel        a sound model that this NPU refuses: node, operator, reason
    ├── NotCalibrated           ranges are missing
    ├── SessionLost             the server does not know the session (lease over, server restarted)
    ├── QuotaExceeded           too many sessions, bytes or batches in flight
    ├── Unauthenticated         no or wrong credentials
    ├── DeviceChanged           the arithmetic behind the endpoint is not the one the session began with
    ├── DeviceFault             the device failed, or broke the protocol
    ├── ServerUnavailable       no server answers at the endpoint
    └── Timeout                 the server answers too late

A server raises these; `status_of` gives the gRPC status code's name and `from_status` builds the same class
again on the client. The class travels by name in the trailing metadata key `ERROR_KEY`, so that a client can
tell classes apart that share a status code.
"""

ERROR_KEY = "npu-error"


class NpuError(Exception):
    """Base of every error that this product raises on purpose."""


class InvalidInput(NpuError, ValueError):
    """A value is wrong: shape, dtype, range, name or file."""


class InvalidModel(InvalidInput):
    """The bytes are not an ONNX model that can be read."""


class InvalidProfile(InvalidInput):
    """A numerics profile says something illegal."""


class NonFiniteInput(InvalidInput):
    """NaN or infinity where a real number is needed."""


class MissingPackage(NpuError, ImportError):
    """A package of an extra is not installed; the message holds the line that installs it."""


class UnsupportedModel(NpuError):
    """A sound model that this NPU refuses; the message names node, operator and reason."""


class NotCalibrated(NpuError):
    """Activation ranges are missing."""


class SessionLost(NpuError):
    """The server does not know the session: its lease is over or the server was restarted."""


class QuotaExceeded(NpuError):
    """Too many sessions, bytes or batches in flight."""


class Unauthenticated(NpuError):
    """No credentials, or wrong ones."""


class DeviceChanged(NpuError):
    """The arithmetic behind the endpoint is not the one that the session began with."""


class DeviceFault(NpuError):
    """The device failed, or one side broke the protocol."""


class ServerUnavailable(NpuError):
    """No server answers at the endpoint."""


class Timeout(NpuError):
    """The server answers too late."""


# The first class of a code is the one that `from_status` falls back on.
_STATUS: dict[type[NpuError], str] = {
    InvalidInput: "INVALID_ARGUMENT",
    InvalidModel: "INVALID_ARGUMENT",
    InvalidProfile: "INVALID_ARGUMENT",
    NonFiniteInput: "INVALID_ARGUMENT",
    UnsupportedModel: "FAILED_PRECONDITION",
    MissingPackage: "FAILED_PRECONDITION",
    NotCalibrated: "FAILED_PRECONDITION",
    SessionLost: "NOT_FOUND",
    QuotaExceeded: "RESOURCE_EXHAUSTED",
    Unauthenticated: "UNAUTHENTICATED",
    DeviceChanged: "ABORTED",
    DeviceFault: "INTERNAL",
    ServerUnavailable: "UNAVAILABLE",
    Timeout: "DEADLINE_EXCEEDED",
}
_BY_NAME = {cls.__name__: cls for cls in _STATUS}
_BY_STATUS = {code: cls for cls, code in reversed(_STATUS.items())}


def status_of(error: NpuError) -> str:
    """Name of the `grpc.StatusCode` that stands for `error`."""
    for cls in type(error).__mro__:
        if cls in _STATUS:
            return _STATUS[cls]
    return "INTERNAL"


def from_status(code: str, class_name: str | None, message: str) -> NpuError:
    """The error that a server meant.

    Args:
        code: name of the `grpc.StatusCode`.
        class_name: value of the trailing metadata key `ERROR_KEY`, if the server sent one.
        message: the status details.
    """
    cls = _BY_NAME.get(class_name or "") or _BY_STATUS.get(code, DeviceFault)
    return cls(message)
