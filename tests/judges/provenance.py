"""What a run of the judges depends on: the code that it judged, the engines, the CPU."""

import ast
import hashlib
import json
import platform
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from npu_server.backends.emulator.native import levels

_ROOT = Path(__file__).parents[2]
_JUDGED = (
    "npu_server/numerics",
    "npu_server/compile",
    "npu_server/execution",
    "npu_server/profiles",
    "npu_server/backends",
    "tests/judges",
)
_ENGINES = ("onnxruntime", "tflite-micro", "ai-edge-litert", "tosa-tools", "torch", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def digest() -> str:
    """SHA-256 (hex) of all code and profiles that decide about the matrix; comments and docstrings do not.

    Nor does the page's own wording (`report.py`), nor tests.
    """
    found = hashlib.sha256()
    for folder in _JUDGED:
        for path in sorted(_ROOT.joinpath(folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".cpp") and not path.name.startswith(("test_", "report")):
                found.update(f"{path.relative_to(_ROOT).as_posix()}\n{essence(path)}\n".encode())
    return found.hexdigest()


def essence(path: Path) -> str:
    """A file without what decides about nothing."""
    text = path.read_text("utf-8")
    if path.suffix == ".toml":
        return json.dumps(tomllib.loads(text), sort_keys=True)
    if path.suffix == ".cpp":
        return text
    return " ".join(_walk(ast.parse(text)))


def _walk(node: object) -> Iterator[str]:
    """The syntax tree, without what is empty: newer versions of Python add such fields."""
    if isinstance(node, list):
        for item in node:
            if not _is_docstring(item):
                yield from _walk(item)
    elif isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name, value in ast.iter_fields(node):
            if value is not None and value != [] and name not in ("ctx", "kind"):
                yield name
                yield from _walk(value)
        yield ")"
    else:
        yield repr(node)


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def versions() -> str:
    """The engines and what our backends compute with."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in _ENGINES)


def kernels() -> str:
    """What the emulator's convolutions and fully connected layers were computed with, each of them."""
    return ", ".join(["torch", *(level.name for level in levels())])


def processor() -> str:
    """The CPU and what it has for integers."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    about = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))
    }
    flags = about.get("flags", "").split()
    has = [flag for flag in _FLAGS if flag in flags]
    return (
        f"{about.get('model name', platform.processor() or 'unknown')} ({', '.join(has) or 'flags unknown'})"
    )
