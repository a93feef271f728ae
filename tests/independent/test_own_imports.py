"""The second opinion is one: it shares no code with what it judges."""

import ast
from pathlib import Path

import pytest

ROOM = Path(__file__).parent
_JUDGED = ("npu_server", "npu_wire")
_DOORS = ("product.py",)
# What the room borrows: low-level authoring, and the networks of the catalogue.
_BORROWED = {
    "tests.judges.tflite_models": "judges/tflite_models.py",
    "tests.architectures.catalogue": "architectures/catalogue.py",
    "tests.architectures.nets": "architectures/nets.py",
}
_FILES = [p for p in sorted(ROOM.glob("*.py")) if p.name not in _DOORS and not p.name.startswith("test_")]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda p: p.name)
def test_room_knows_nothing_of_the_product(path: Path) -> None:
    """No module but the door imports the server, the wire, or tests that do."""
    imports = _imports(path)
    assert not [name for name in imports if name.split(".")[0] in _JUDGED]
    assert {name for name in imports if name.split(".")[0] == "tests"} <= set(_BORROWED)


@pytest.mark.parametrize("borrowed", _BORROWED.values())
def test_what_is_borrowed_knows_nothing_of_the_product(borrowed: str) -> None:
    """Neither do the files of other rooms that this one uses."""
    imports = _imports(ROOM.parent / borrowed)
    assert not [name for name in imports if name.split(".")[0] in (*_JUDGED, "judges")]
