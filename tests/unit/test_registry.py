"""Backends by name."""

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from npu_server.registry import create_backend, installed_backends
from npu_server.seam import ENTRY_POINT_GROUP, BackendOptions
from npu_wire.errors import InvalidInput, MissingPackage

OPTIONS = BackendOptions()


def point(name: str, value: str) -> EntryPoint:
    """An entry point as a package would declare it."""
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


def pyproject() -> dict:
    """What the distribution says of itself."""
    return tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def test_our_own_backends_are_registered() -> None:
    """What pyproject.toml promises."""
    assert pyproject()["entry-points"][ENTRY_POINT_GROUP].keys() <= {p.name for p in installed_backends()}


def test_an_unknown_name_lists_the_installed_ones() -> None:
    """One that nobody has is not ours to install: no extra is made up for it."""
    installed = [point("reference", "x:Y"), point("vendor", "x:Z")]
    for name in ("emu", "onnxruntime", "board"):
        with pytest.raises(InvalidInput) as caught:
            create_backend(name, OPTIONS, installed)
        assert f"unknown backend '{name}'; installed: reference, vendor" in str(caught.value)
        assert f"Install the package that brings it (entry point group '{ENTRY_POINT_GROUP}')" in str(
            caught.value
        )
        assert "pip" not in str(caught.value)


def test_a_missing_package_is_answered_with_its_install_line() -> None:
    """Only asking for a backend imports it; the extra that is named exists and is one of ours."""
    extras = pyproject()["optional-dependencies"]
    for name in pyproject()["entry-points"][ENTRY_POINT_GROUP]:
        installed = [point(name, "package_that_nobody_has:Backend"), point("vendor", "x:Y")]
        with pytest.raises(MissingPackage, match="'package_that_nobody_has' is missing") as caught:
            create_backend(name, OPTIONS, installed)
        (extra,) = re.findall(r"pip install 'npu-in-the-loop\[(\w+)\]'", str(caught.value))
        assert extra in extras
