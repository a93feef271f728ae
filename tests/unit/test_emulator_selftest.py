"""Kernels that are wrong on a machine are found at start-up, named, and replaced by exact ones."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from onnx import helper
from prometheus_client import generate_latest
from single_layers import Scale, SingleLayer, random_codes, single_layer

from npu_server.app import serve
from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.emulator.selftest import examine, expected_sums, is_exact
from npu_server.backends.emulator.sums import (
    CPU_METHODS,
    CUDA_METHODS,
    FloatingPoint,
    MatrixProduct,
    Method,
    OneDnnConvolution,
    Sums,
    Task,
)
from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.graph import Window
from npu_server.config import ServeConfig
from npu_server.conformance.wire import RemoteTarget
from npu_server.seam import BackendOptions
from npu_wire.errors import DeviceFault

CPU = torch.device("cpu")
EXACT = FloatingPoint(torch.float64)


class OffByOne(FloatingPoint):
    """Adds 1 to the largest sums only: wrong in a few elements of a few cases."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.name = "off by one"

    def bind(self, task: Task, device: torch.device) -> Sums:
        right = super().bind(task, device)
        return lambda x: right(x) + (right(x) > 16_000_000)


def convolution() -> SingleLayer:
    """Convolutions with weights of one sign, so that sums of products saturate 16 bits."""
    rng = np.random.default_rng(0)
    weights = {
        "stem_w": rng.uniform(0.5, 1, (16, 3, 3, 3)).astype(np.float32),
        "w": rng.uniform(0.5, 1, (128, 16, 1, 1)).astype(np.float32),
        "head_w": rng.uniform(0.5, 1, (8, 128, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "stem_w"], ["stem"], "stem", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Conv", ["stem", "w"], ["middle"], "middle"),
        helper.make_node("Conv", ["middle", "head_w"], ["y"], "head"),
    ]
    scales = {
        "x": Scale(0.1, -128),
        "stem": Scale(2.0, -128),
        "middle": Scale(30, -128),
        "y": Scale(4000, -128),
    }
    return single_layer("tflm", nodes, (3, 8, 8), scales, weights)


@pytest.mark.parametrize("method", [*CPU_METHODS, *CUDA_METHODS], ids=lambda method: type(method).__name__)
def test_every_method_is_exact_here(method: Method) -> None:
    """All ways to sum agree with NumPy's int64; those for a GPU run their torch code on the CPU."""
    assert is_exact(method, CPU)


def test_expected_sums_by_hand() -> None:
    """Codes 3, -5, zero point 1, weights 2, -7: 2 * 2 - 7 * -6 = 46, and 2 * -6 = -12 at the edge."""
    task = Task(np.array([[[[2, -7]]]], np.int8), 1, Window((1, 2), pads=(0, 0, 0, 1)))
    image = np.array([3, -5], np.int8).reshape(1, 1, 2, 1)
    assert expected_sums(task, image).reshape(-1).tolist() == [46, -12]


def test_a_wrong_kernel_is_found_and_replaced() -> None:
    """A kernel that is 1 off in its largest sums is not trusted; bits stay, the capabilities tell."""
    wrong, net = OffByOne(), convolution()
    verdict = examine((wrong, EXACT), CPU)
    assert (verdict.trusted, verdict.failed) == ((EXACT,), ("off by one",))
    sound, broken = (EmulatorBackend(BackendOptions(profile="tflm"), m) for m in [(EXACT,), (wrong, EXACT)])
    told = [backend.open() for backend in (sound, broken)]
    assert [capabilities.failed_kernels for capabilities in told] == [(), ("off by one",)]
    assert told[0].fingerprint == told[1].fingerprint
    batch = random_codes(np.random.default_rng(1), 2, 3, 8, 8)
    programs = [b.compile(net.model, net.ranges) for b in (broken, ReferenceBackend(BackendOptions("tflm")))]
    for actual, expected in zip(
        *(program.forward(program.layer_map.named(batch), range(3)) for program in programs), strict=True
    ):
        np.testing.assert_array_equal(actual.data, expected.data)


def test_no_exact_kernel_is_a_fault() -> None:
    """A device on which even the last resort is wrong is refused."""
    with pytest.raises(DeviceFault, match="off by one sums on cpu are not exact"):
        EmulatorBackend(BackendOptions(profile="tflm"), (OffByOne(),)).open()


def test_server_shows_what_failed() -> None:
    """Metrics, status and Describe name the kernel that failed; a client sees what the backend says."""
    backend = EmulatorBackend(BackendOptions(profile="tflm"), (OffByOne(), EXACT))
    with serve(backend, ServeConfig(listen="127.0.0.1:0", http="off")) as server:
        assert server.status().device.failed_kernels == ("off by one",)
        metrics = generate_latest(server.telemetry.registry).decode()
        told = RemoteTarget(server.address, timeout_s=60.0)
        assert told.capabilities == backend.open()
        assert told.capabilities.failed_kernels == ("off by one",)
        told.close()
    assert 'npu_failed_kernel{kernel="off by one"} 1.0' in metrics


CHILD = """
import json, sys
import numpy as np
from test_emulator_selftest import convolution
from single_layers import BACKENDS, random_codes
from npu_server.seam import BackendOptions
from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.emulator.selftest import expected_sums
net = convolution()
batch = random_codes(np.random.default_rng(1), 4, 3, 8, 8)
outputs = [net.run(backend, batch) for backend in BACKENDS]
backend = EmulatorBackend(BackendOptions(profile="tflm"))
equal = all(np.array_equal(outputs[0][name], outputs[1][name]) for name in outputs[0])
print(json.dumps([equal, backend.open().failed_kernels]))
"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_cpu_without_vnni(isa: str) -> None:
    """On a CPU whose INT8 units saturate, both INT8 kernels are found and the bits are the reference's."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("oneDNN has no such kernels on this CPU")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": os.path.dirname(__file__)}
    run = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [True, [MatrixProduct.name, OneDnnConvolution.name][::-1]]
    assert "int8 convolution sums wrongly on this machine" in run.stderr


def task(value: int, channels: int, zero_point: int, groups: int = 1) -> Task:
    """A 1x1 convolution with equal weights."""
    return Task(np.full((2, channels, 1, 1), value, np.int8), zero_point, Window((1, 1)), groups)


def test_conditions_by_hand() -> None:
    """Bounds: 2^24 = 16,777,216 = 127 * 255 * 518.06 for floats, 2^31 = 127 * 128 * 132,104.2 for int32."""
    float32, convolution_u8, product = FloatingPoint(torch.float32), OneDnnConvolution(), MatrixProduct()
    assert [float32.serves(task(127, n, -128)) for n in (518, 519)] == [True, False]
    # Centred codes in [-128, 127] make half of that, but oneDNN may convert before it centres.
    assert [float32.serves(task(127, n, 0)) for n in (1032, 1033)] == [True, False]
    assert [convolution_u8.serves(task(127, n, 0)) for n in (518, 519)] == [True, False]
    assert [product.serves(task(127, n, -128)) for n in (132_104, 132_105)] == [True, False]
    assert not product.serves(task(1, 4, 0, groups=2))
    assert EXACT.serves(task(127, 132_105, -128))


@pytest.mark.parametrize(
    "window",
    [
        Window((3, 3), (1, 1), (1, 1, 1, 1), (2, 2)),
        Window((3, 3), (1, 2), (1, 1, 1, 1)),
        Window((3, 3), (3, 3), (1, 1, 1, 1)),
        Window((2, 2), (1, 1), (2, 0, 2, 0)),
        Window((3, 1)),
    ],
)
def test_onednn_refuses_unusual_windows(window: Window) -> None:
    """Among such windows are those that oneDNN sums wrongly or crashes on."""
    assert not OneDnnConvolution().serves(Task(np.ones((4, 4, *window.size), np.int8), 0, window))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_equals_reference() -> None:
    """On a GPU no kernel fails, and every tensor is the reference's."""
    net = convolution()
    batch = random_codes(np.random.default_rng(1), 4, 3, 8, 8)
    backend = EmulatorBackend(BackendOptions(profile="tflm", device="cuda"))
    assert backend.open().failed_kernels == ()
    program = backend.compile(net.model, net.ranges)
    expected = net.run(ReferenceBackend, batch)
    for tensor in program.forward(program.layer_map.named(batch), range(3)):
        np.testing.assert_array_equal(tensor.data, expected[program.layer_map.layers[tensor.layer].name])
