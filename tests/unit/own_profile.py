"""Profiles of a test's own, made from a shipped one."""

from importlib import resources
from pathlib import Path


def profile_with(tmp_path: Path, line: str) -> str:
    """The tflm profile with another line for what it does not support; its path."""
    text = resources.files("npu_server").joinpath("profiles/tflm.toml").read_text()
    path = tmp_path / "own.toml"
    path.write_text(text.replace('name = "tflm"', 'name = "own"').replace('unsupported = "host"', line))
    return str(path)
