"""A package that is not installed is answered with the line that installs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Literal

from npu_wire.errors import MissingPackage

DISTRIBUTION = "npu-in-the-loop"
Extra = Literal["server", "trainer"]

PACKAGES: dict[Extra, frozenset[str]] = {
    "server": frozenset(
        {
            *("fastapi", "grpc_health", "grpc_reflection", "numba", "onnx", "onnxruntime"),
            *("prometheus_client", "torch", "uvicorn"),
        }
    ),
    "trainer": frozenset(
        {"matplotlib", "numba", "onnx", "onnxscript", "safetensors", "sklearn", "torch", "torchao"}
    ),
}
"""Extra -> the packages that it brings, by the names that they are imported by."""


def install_line(extra: Extra) -> str:
    """The command that installs one side."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def own_version() -> str:
    """The version of this package; words where it runs from a folder that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "of a source tree that is not installed (pip install -e . there gives it a version)"


@contextmanager
def needs(extra: Extra, what: str) -> Iterator[None]:
    """Imports of what an extra brings go in here.

    Args:
        extra: the side that they belong to.
        what: who imports, for the message.

    Raises:
        MissingPackage: one of them is not there; the message holds the install line.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES[extra]:
            raise  # a user's own module, say, lacks one of its own
        raise MissingPackage(
            f"{what} needs the package {package!r}, which is not installed: {install_line(extra)}"
        ) from error
