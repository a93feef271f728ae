"""Finds backends by name among the installed entry points, and imports only the one that was asked for."""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from npu_server.seam import ENTRY_POINT_GROUP, Backend, BackendOptions
from npu_wire.errors import InvalidInput, MissingPackage
from npu_wire.extras import install_line

_OURS = ("reference", "emulator")
_INSTALL_THE_PACKAGE = f"Install the package that brings it (entry point group '{ENTRY_POINT_GROUP}')."


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
        InvalidInput: unknown name, or options that it refuses.
        MissingPackage: a package that it needs is not installed.
    """
    points = {point.name: point for point in (installed_backends() if installed is None else installed)}
    if name not in points:
        known = ", ".join(points) or "none"
        raise InvalidInput(f"unknown backend '{name}'; installed: {known}. {_INSTALL_THE_PACKAGE}")
    try:
        backend_class = points[name].load()
    except ImportError as error:
        remedy = f"Install it: {install_line('server')}" if name in _OURS else _INSTALL_THE_PACKAGE
        raise MissingPackage(
            f"backend '{name}' cannot be loaded because '{error.name or error}' is missing. {remedy}"
        ) from error
    backend: Backend = backend_class(options)
    return backend
