"""Client side of NPU-in-the-Loop: train a PyTorch model against the arithmetic of an NPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_client.connection import connect
    from trainer_client.qat import prepare

__all__ = ["connect", "prepare"]


def __getattr__(name: str) -> Any:
    """Imports on first use (PEP 562): `prepare` needs torch, `connect` gRPC, neither the other's."""
    if name == "connect":
        from trainer_client.connection import connect

        return connect
    if name == "prepare":
        from trainer_client.qat import prepare

        return prepare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
