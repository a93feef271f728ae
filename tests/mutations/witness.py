"""A pytest plugin, loaded in the mutant's own process: what is most likely to fail goes first, and is told.

Reads `MUTANT_FIRST` (part of test ids), writes the first failure to `MUTANT_VERDICT` as JSON.
"""

import json
import os
from pathlib import Path

import pytest

import npu_server

_TREE = Path(__file__).parents[2]


def pytest_configure() -> None:
    """Makes sure that the mutant's tree is what runs."""
    if not Path(npu_server.__file__).is_relative_to(_TREE):
        raise pytest.UsageError(f"npu_server comes from {npu_server.__file__}, not from {_TREE}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders by the hint, and keeps the order otherwise."""
    hint = os.environ["MUTANT_FIRST"]
    items.sort(key=lambda item: hint not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Tells the first failure."""
    report = yield
    if report.failed and call.excinfo is not None:
        lines = str(call.excinfo.value).strip().splitlines() or [""]
        failure = {"test": item.nodeid, "error": call.excinfo.typename, "message": lines[0][:200]}
        Path(os.environ["MUTANT_VERDICT"]).write_text(json.dumps(failure), "utf-8")
    return report
