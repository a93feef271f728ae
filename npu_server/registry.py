"""Finds backends by name among the installed entry points, and imports only the one that was asked for."""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from npu_server.seam import ENTRY_POINT_GROUP, Backend, BackendOptions
from npu_wire.errors import InvalidInput

# Extra of this distribution that brings what a backend of ours imports.
_EXTRAS = {"reference": "server", "emulator": "server"}


def installed_backends() -> tuple[EntryPoint, ...]:
    """Every installed backend, ours and others', sorted by name."""
    return tuple(sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name))


def create_backend(
    name: str, options: BackendOptions, installed: Iterable[EntryPoint] | None = None
) -> Backend:
    """Builds a backend; opens nothing.

    Args:
        name: name of its entry point.
        options: what it is built from.
        installed: the entry points to choose from; None: those of this environment.

    Raises:
        InvalidInput: unknown name, a package that it needs is missing, or options that it refuses.
    """
    points = {point.name: point for point in (installed_backends() if installed is None else installed)}
    if name not in points:
        known = ", ".join(points) or "none"
        raise InvalidInput(f"unknown backend '{name}'; installed: {known}.{_remedy(name)}")
    try:
        backend_class = points[name].load()
    except ImportError as error:
        missing = error.name or str(error)
        raise InvalidInput(
            f"backend '{name}' cannot be loaded because '{missing}' is missing.{_remedy(name)}"
        ) from error
    backend: Backend = backend_class(options)
    return backend


def _remedy(name: str) -> str:
    if name in _EXTRAS:
        return f" Install it: pip install 'npu-in-the-loop[{_EXTRAS[name]}]'"
    return f" Install the package that brings it (entry point group '{ENTRY_POINT_GROUP}')."
