"""The native kernels: by hand, one that is wrong, none at all, and how they are built."""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from single_layers import random_codes
from test_emulator_selftest import convolution

from npu_server.app import serve
from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.emulator.native import Level, bind, build, levels
from npu_server.backends.emulator.native.library import load
from npu_server.backends.emulator.selftest import computes_exactly
from npu_server.backends.emulator.sums import Task
from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.graph import Window
from npu_server.config import ServeConfig
from npu_server.conformance.wire import RemoteTarget
from npu_server.numerics.requantize import Output, make_multiplier
from npu_server.numerics.rules import AccumulatorRule, RequantizeRule
from npu_server.seam import BackendOptions

each_level = pytest.mark.parametrize("level", levels(), ids=lambda level: level.name)
Q31 = RequantizeRule("q31", "half_away", 2)


def outputs(backend: EmulatorBackend | ReferenceBackend) -> list[np.ndarray]:
    """What a backend computes of every layer of three convolutions."""
    net = convolution()
    program = backend.compile(net.model, net.ranges)
    batch = random_codes(np.random.default_rng(1), 2, 3, 8, 8)
    return [t.data for t in program.forward(program.layer_map.named(batch), range(3)) if t]


def off_by_one(level: Level) -> Level:
    """The same kernels with a last code that is one more, modulo 256."""

    def run(structure, image, codes, first, last):
        status = level.run(structure, image, codes, first, last)
        address = codes + last * structure._obj.outputs - 1
        held = (np.ctypeslib.ctypes.c_int8).from_address(address)
        held.value += 1
        return status

    return dataclasses.replace(level, name="off by one", run=run)


@each_level
def test_every_level_is_exact_here(level: Level) -> None:
    """The start-up test passes for each set of kernels that this CPU runs, not just for the one in use."""
    assert computes_exactly(level)


@each_level
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (RequantizeRule("q31", "half_away", 2), [6, -6, 5, -5, 127, -128]),
        (RequantizeRule("q31", "half_up", 1), [6, -5, 5, -5, 127, -128]),
        (RequantizeRule("power_of_two", "floor", 1), [5, -6, 5, -5, 127, -128]),
        (RequantizeRule("power_of_two", "half_away", 1), [6, -6, 5, -5, 127, -128]),
        (RequantizeRule("float32", "half_even", 1), [6, -6, 5, -5, 127, -128]),
        (RequantizeRule("float64", "half_away", 1), [6, -6, 5, -5, 127, -128]),
    ],
    ids=lambda value: f"{value.multiplier}-{value.rounding}" if isinstance(value, RequantizeRule) else "",
)
def test_ties_by_hand(level: Level, rule: RequantizeRule, expected: list[int]) -> None:
    """Quarters of 22, -22, 20, -20 and of what leaves INT8; the bias of 2 is part of them."""
    task = Task(np.array([[[[2]], [[4]]]], np.int8), 0, Window((1, 1)))
    register, output = AccumulatorRule(32, "saturate", "sum"), Output(0)
    layer = bind(level, task, np.array([2]), make_multiplier(np.array([1.0]), 4.0, rule), register, output)
    assert layer is not None
    image = np.array([[0, 5], [0, -6], [1, 4], [1, -6], [127, 127], [-128, -128]], np.int8)
    codes = layer(torch.from_numpy(image.reshape(1, 1, 6, 2)))
    assert codes.reshape(-1).tolist() == expected


@each_level
@pytest.mark.parametrize(("overflow", "expected"), [("saturate", [63, -64]), ("wrap", [-28, 28])])
def test_narrow_registers_by_hand(level: Level, overflow: str, expected: list[int]) -> None:
    """A register of 8 bits: sums 200 and -200 stop at 127 and -128, or come round to -56 and 56; halves."""
    task = Task(np.full((1, 2, 1, 1), 1, np.int8), 0, Window((1, 1)))
    multiplier = make_multiplier(np.array([0.5]), 1.0, RequantizeRule("q31", "floor", 1))
    layer = bind(
        level, task, np.zeros(1, np.int64), multiplier, AccumulatorRule(8, overflow, "sum"), Output(0)
    )
    assert layer is not None
    image = np.array([[100, 100], [-100, -100]], np.int8).reshape(2, 1, 1, 2)
    assert layer(torch.from_numpy(image)).reshape(-1).tolist() == expected


@each_level
def test_threads_share_the_pixels(level: Level) -> None:
    """Two threads compute what one does, every pixel of it."""
    rng = np.random.default_rng(0)
    task = Task(
        rng.integers(-127, 128, (40, 30, 3, 3)).astype(np.int8), 5, Window((3, 3), (1, 1), (1, 1, 1, 1))
    )
    multiplier = make_multiplier(np.full(40, 1e-4), 1.0, Q31)
    register = AccumulatorRule(32, "saturate", "sum")
    layer = bind(level, task, np.zeros(40, np.int64), multiplier, register, Output(3))
    assert layer is not None
    image = torch.from_numpy(random_codes(rng, 3, 17, 13, 30))
    alone, before = layer(image), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = layer(image)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)
    assert len(alone.unique()) > 50


@pytest.mark.skipif(not levels(), reason="no native kernels here")
def test_sums_beyond_32_bits_are_left_to_others() -> None:
    """2^31 is 131,071 * 127 * 129.01 (inputs of -128 less a zero point of 1); bias and weights count."""
    register, output = AccumulatorRule(32, "wrap", "sum"), Output(0)
    multiplier = make_multiplier(np.array([1e-9]), 1.0, Q31)

    def served(channels: int, bias: int) -> bool:
        task = Task(np.full((1, channels, 1, 1), 127, np.int8), 1, Window((1, 1)))
        return bind(levels()[0], task, np.array([bias]), multiplier, register, output) is not None

    assert served(131_071, 0)
    assert not served(131_072 + 20, 0)
    assert not served(131_071, 1 << 22)


@pytest.mark.skipif(not levels(), reason="no native kernels here")
def test_wrong_kernels_are_found_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """Kernels with one wrong code are not trusted: log, Describe and capabilities say so, bits stay."""
    wrong = off_by_one(levels()[0])
    backend = EmulatorBackend(BackendOptions(profile="tflm"), levels=(wrong, *levels()[1:]))
    with caplog.at_level(logging.WARNING):
        told = backend.open()
    assert told.failed_kernels == ("off by one",)
    assert told.kernels == (levels()[1].name if levels()[1:] else "torch")
    assert "off by one sums wrongly on this machine" in caplog.text
    for actual, expected in zip(
        outputs(backend), outputs(ReferenceBackend(BackendOptions("tflm"))), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


def test_without_native_kernels_torch_computes() -> None:
    """Where no compiler was: the same fingerprint, the same bits, and a client is told what computes."""
    backend = EmulatorBackend(BackendOptions(profile="tflm"), levels=())
    with serve(backend, ServeConfig(listen="127.0.0.1:0", http="off")) as server:
        told = RemoteTarget(server.address, timeout_s=60.0)
        assert told.capabilities.kernels == "torch"
        told.close()
    usual = EmulatorBackend(BackendOptions(profile="tflm"))
    assert usual.open().kernels == (levels()[0].name if levels() else "torch")
    assert usual.open().fingerprint == backend.open().fingerprint
    for actual, expected in zip(outputs(backend), outputs(usual), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_library_of_another_source_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who edits the kernels and does not build them gets torch and a warning, not the old arithmetic."""
    if not levels():
        pytest.skip("no native kernels here")
    source = tmp_path / "kernels.cpp"
    source.write_text(build.SOURCE.read_text() + "// another\n")
    monkeypatch.setattr(build, "SOURCE", source)
    with caplog.at_level(logging.INFO):
        assert load(build.LIBRARY) == ()
        assert "is not what its source says" in caplog.text
        assert load(tmp_path / "kernels.so") == ()
        assert "no native kernels were built" in caplog.text
        (tmp_path / "broken.so").write_text("no library")
        assert load(tmp_path / "broken.so") == ()


def test_no_compiler_is_said(tmp_path: Path) -> None:
    """The build names what is missing and leaves nothing behind."""
    for name in ("build.py", "kernels.cpp"):
        shutil.copy(build.HERE / name, tmp_path)
    run = subprocess.run(
        [sys.executable, tmp_path / "build.py"],
        env=os.environ | {"CXX": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("no native kernels: ")
    assert str(tmp_path / "none") in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "kernels.cpp"]
