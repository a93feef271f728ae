"""Backends by name."""

from importlib.metadata import EntryPoint

import pytest

from npu_server.backends.base import ENTRY_POINT_GROUP, BackendOptions
from npu_server.registry import create_backend, installed_backends
from npu_wire.errors import InvalidInput

OPTIONS = BackendOptions()


def point(name: str, value: str) -> EntryPoint:
    """An entry point as a package would declare it."""
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


def test_our_own_backends_are_registered() -> None:
    """What pyproject.toml promises."""
    assert {"reference", "emulator"} <= {p.name for p in installed_backends()}


def test_an_unknown_name_lists_the_installed_ones() -> None:
    """And, for one of ours, the extra to install."""
    installed = [point("reference", "x:Y"), point("vendor", "x:Z")]
    with pytest.raises(InvalidInput, match="unknown backend 'emu'; installed: reference, vendor"):
        create_backend("emu", OPTIONS, installed)
    with pytest.raises(InvalidInput, match=r"pip install 'npu-in-the-loop\[board\]'"):
        create_backend("board", OPTIONS, installed)


def test_a_missing_package_is_answered_with_its_install_line() -> None:
    """Only asking for a backend imports it."""
    installed = [point("onnxruntime", "package_that_nobody_has:Backend"), point("reference", "x:Y")]
    with pytest.raises(InvalidInput, match=r"'package_that_nobody_has'.*npu-in-the-loop\[onnxruntime\]"):
        create_backend("onnxruntime", OPTIONS, installed)
