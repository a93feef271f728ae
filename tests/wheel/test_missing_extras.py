"""With an extra missing, each command works or names the line that installs it."""

import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from npu_wire.extras import PACKAGES

from .commands import ANSWERS, fault, run

HIDE = """
import sys
from importlib.machinery import PathFinder
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
"""
# They import torch: several seconds together.
SLOW = {
    "trainer": ("demo", "compare", "train", "prepare", "report"),
    "server": ("demo", "compare", "train", "report", "prepare", "connect", "conformance"),
}


def test_the_table_of_packages_is_that_of_the_distribution() -> None:
    """Each extra brings exactly the packages by whose absence it is known."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in PACKAGES.items():
        wanted = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"][extra]}
        installed = packages_distributions()
        assert {installed[package][0].replace("_", "-") for package in packages} == wanted


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        pytest.param(extra, command, marks=[pytest.mark.slow] if command in SLOW.get(extra, ()) else [])
        for extra, answers in ANSWERS.items()
        if extra in ("", *PACKAGES)
        for command in answers
    ],
)
def test_a_missing_extra_is_named(extra: str, command: str, tmp_path: Path) -> None:
    """Its install line and exit status 2, or what the command does; never a traceback."""
    hidden = frozenset().union(*PACKAGES.values()) - PACKAGES.get(extra, frozenset())  # type: ignore[call-overload]
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=set(hidden)))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    status, errors = run(command, Path(sys.executable).parent, tmp_path, {"PYTHONPATH": path})
    assert fault(command, ANSWERS[extra][command], status, errors) == ""
