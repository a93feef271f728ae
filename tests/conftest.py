"""Fixtures of all tests."""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """See `tests.halves`."""
    parser.addoption("--half", type=int, choices=[1, 2], help="of the files with selected tests")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests of one half: files whole, the largest first, each to the half that has less yet."""
    half = config.getoption("--half")
    if half is None:
        return
    tests: tuple[list[Path], list[Path]] = ([], [])
    load = [0, 0]
    for file, count in sorted(Counter(item.path for item in items).items(), key=lambda x: (-x[1], x[0])):
        lighter = load.index(min(load))
        tests[lighter].append(file)
        load[lighter] += count
    chosen = {*tests[half - 1]}
    config.hook.pytest_deselected(items=[item for item in items if item.path not in chosen])
    items[:] = [item for item in items if item.path in chosen]


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """The ONNX exporter reads the sources of its 500 operators for each export; once a process will do."""
    if "trainer_client.qat.capture" not in sys.modules:  # nobody exports
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", once)
        yield
