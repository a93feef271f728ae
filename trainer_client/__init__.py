"""Client side of NPU-in-the-Loop: train a PyTorch model against the arithmetic of an NPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer_client.qat import prepare

__all__ = ["prepare"]


def __getattr__(name: str) -> Any:
    """Imports `prepare` on first use: it needs torch, the rest of the package does not (PEP 562)."""
    if name == "prepare":
        from trainer_client.qat import prepare

        return prepare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
