"""Client side of NPU-in-the-Loop: train a PyTorch model against the arithmetic of an NPU.

`connect` finds or starts an NPU, `prepare` puts a model in the loop with it, `Trace` records when what ran.
Every error that they raise on purpose is an `NpuError`; `npu_wire.errors` draws the tree of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from npu_wire.errors import (
    DeviceChanged,
    DeviceFault,
    InvalidInput,
    InvalidModel,
    InvalidProfile,
    MissingPackage,
    NonFiniteInput,
    NotCalibrated,
    NpuError,
    QuotaExceeded,
    ServerUnavailable,
    SessionLost,
    Timeout,
    Unauthenticated,
    UnsupportedModel,
)
from npu_wire.extras import needs

if TYPE_CHECKING:
    from trainer_client.npu.connection import Connection, connect
    from trainer_client.qat.module import QatModule, prepare
    from trainer_client.qat.noise import LayerNoise, NoiseReport
    from trainer_client.qat.trace import Trace

__all__ = [
    "Connection",
    "DeviceChanged",
    "DeviceFault",
    "InvalidInput",
    "InvalidModel",
    "InvalidProfile",
    "LayerNoise",
    "MissingPackage",
    "NoiseReport",
    "NonFiniteInput",
    "NotCalibrated",
    "NpuError",
    "QatModule",
    "QuotaExceeded",
    "ServerUnavailable",
    "SessionLost",
    "Timeout",
    "Trace",
    "Unauthenticated",
    "UnsupportedModel",
    "connect",
    "prepare",
]

# Imported on first use (PEP 562): `prepare` needs torch, `connect` gRPC, neither the other's.
_WHERE = {
    "Connection": "npu.connection",
    "LayerNoise": "qat.noise",
    "NoiseReport": "qat.noise",
    "QatModule": "qat.module",
    "Trace": "qat.trace",
    "connect": "npu.connection",
    "prepare": "qat.module",
}


def __getattr__(name: str) -> Any:
    """A public name that is not imported yet."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs("trainer", f"{__name__}.{name}"):
        module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    """All public names, for completion."""
    return sorted([*globals(), *_WHERE])
