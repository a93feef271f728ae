"""The conformance suite passes what is right, and each fault is caught by the check that is meant for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import faulty_backends as faulty
import pytest
import torch
from fake_backend import Start

from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.reading.operators import operators_of
from npu_server.conformance.cases import all_cases
from npu_server.conformance.report import Report, Verdict
from npu_server.conformance.suite import run_suite
from npu_server.conformance.wire import RemoteTarget
from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.registry import create_backend
from npu_server.seam import Backend, BackendOptions

OPTIONS = BackendOptions(profile="tflm", threads=1)


def connect(endpoint: str) -> RemoteTarget:
    """As the command does."""
    return RemoteTarget(endpoint, timeout_s=60.0)


def examine(backend: type[Backend], tolerance_lsb: int = 16) -> Report:
    """The suite on a class of backend, served by a server of its own."""
    return run_suite(lambda: backend(OPTIONS), "", connect, "tflm", tolerance_lsb)


def failures(report: Report) -> dict[str, str]:
    """What failed ("operator NAME", "GROUP: DEMAND, ROUTE") and why."""
    found = {f"operator {o.op}": o.detail for o in report.operators if o.verdict is Verdict.FAILED}
    for check in report.checks:
        if check.verdict is Verdict.FAILED:
            found[f"{check.group}: {check.name}, {check.route}"] = check.detail
    return found


QUICK = ("tflm", "onnxruntime", "pow2-trunc", "acc16-wrap")
"""Profiles that differ most; the slow tests try all that ship."""


@pytest.mark.parametrize(
    "profile", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in list_profiles()]
)
@pytest.mark.parametrize("name", ["reference", "emulator"])
def test_our_backends_pass(name: str, profile: str) -> None:
    """In the process and over gRPC, with every profile: no mismatch, and everything declared was tried."""
    options = BackendOptions(profile=profile, threads=1)
    report = run_suite(lambda: create_backend(name, options), "", connect, profile)
    assert failures(report) == {}
    assert report.passed
    assert report.exact
    declared = set(operators_of(load_profile(profile)))
    tried = {o.op: o for o in report.operators if o.verdict is Verdict.PASSED}
    assert tried.keys() == declared
    for operator in tried.values():
        assert operator.elements == operator.equal > 0
        assert operator.max_lsb == 0
    refused = {o.op for o in report.operators if o.verdict is Verdict.REFUSED}
    assert refused == all_cases().keys() - declared


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="oneDNN has one kernel here")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
@pytest.mark.parametrize("profile", QUICK)  # which kernels sum depends on the machine, not on the profile
def test_the_emulator_passes_where_kernels_are_wrong(profile: str, isa: str, tmp_path: Path) -> None:
    """On CPUs without VNNI INT8 kernels fail the start-up test: and all passes."""
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "npu_server", "conformance", "--backend", "emulator"]
    command += ["--profile", profile, "--json", str(found)]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "sums wrongly on this machine" in done.stderr
    assert json.loads(found.read_text("utf-8"))["passed"]


def test_a_right_vendor_passes() -> None:
    """Fewer operators and a smaller batch than ours are no fault."""
    report = examine(faulty.VendorBackend)
    assert failures(report) == {}
    assert {o.op for o in report.operators if o.verdict is Verdict.PASSED} == set(
        faulty.VendorBackend.operators
    )


@pytest.mark.parametrize(
    ("backend", "check"),
    [
        (faulty.with_program(faulty.OffByOne), "operator Mul"),
        (faulty.with_program(faulty.WrongScale), "layer map: Dequantized by the layer map"),
        (faulty.with_program(faulty.DeniesSaturation), "operator Conv"),
        (faulty.with_program(faulty.ReusesMemory), "memory: A yielded tensor is never written to again"),
        (faulty.with_program(faulty.WritesInput), "memory: The batch belongs to the caller"),
        (faulty.with_program(faulty.Nondeterministic), "determinism: The same batch gives the same bits"),
        (faulty.with_program(faulty.SamplesMix), "determinism: A sample gives the same bits in any batch"),
        (faulty.with_program(faulty.TapsShow), "determinism: Which layers are tapped"),
        (faulty.with_program(faulty.InputsByOrder), "signature: Inputs go by name"),
        (faulty.with_program(faulty.LastLayerOnly), "signature: Inputs go by name"),
        (faulty.with_program(faulty.ForgetsShapes), "weights: A program tells name and shape"),
        (faulty.with_program(faulty.HalfAnUpdate), "weights: An update with a wrong name"),
        (faulty.with_program(faulty.LateWeights), "weights: After an update a program yields"),
        (faulty.with_program(faulty.NeverCloses), "lifecycle: Closing twice is allowed"),
        (faulty.with_program(faulty.ServesOtherwise), "transparency: Equal layer maps, bits and refusals"),
        (faulty.with_program(faulty.OneAtATime), "iteration: A batch may wait at any layer"),
        (faulty.GrowsFirmware, "lifecycle: Closing the backend twice is allowed, and opened again"),
        (faulty.AnotherOutput, "operator Add"),
        (faulty.RunsMore, "operator Tanh"),
        (faulty.DeclaresMore, "operator Sigmoid"),
        (faulty.DeclaresUnknown, "operator Frobnicate"),
        (faulty.RefusesVaguely, "operator Sigmoid"),
        (faulty.RefusesAsInvalid, "operator Sigmoid"),
        (faulty.OwnArithmeticFarOff, "operator Tanh"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_fault_is_caught(backend: type[Backend], check: str) -> None:
    """By the check that is meant for it."""
    report = examine(backend)
    assert not report.passed
    assert any(name.startswith(check) for name in failures(report)), failures(report)


@pytest.mark.parametrize(
    ("backend", "only"),
    [
        (faulty.with_program(faulty.OffByOne), {"operator Mul": "differ, by up to 1 LSB"}),
        (faulty.RunsMore, {"operator Tanh": "runs, though it is not declared"}),
        (faulty.DeclaresMore, {"operator Sigmoid": "though reference (tflm) runs it"}),
        (faulty.DeclaresUnknown, {"operator Frobnicate": "nothing vouches for it"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_fault_in_one_operator_fails_only_that(backend: type[Backend], only: dict[str, str]) -> None:
    """And the report says what is wrong with it."""
    found = failures(examine(backend))
    assert found.keys() == only.keys()
    for name, part in only.items():
        assert part in found[name]


def test_arithmetic_of_its_own_is_close_and_never_equal() -> None:
    """Judged by ONNX Runtime in float; the report says so."""
    report = examine(faulty.OwnArithmetic)
    assert failures(report) == {}
    assert not report.exact
    assert "onnxruntime float within 16 LSB" in report.judge


def test_a_server_is_examined_by_its_address(start: Start) -> None:
    """Without the backend in this process, and beside another one that promises the same bits."""
    address = start(ReferenceBackend(OPTIONS)).address
    alone = run_suite(None, address, connect)
    assert failures(alone) == {}
    assert {check.route for check in alone.checks} == {"over gRPC"}
    beside = run_suite(lambda: faulty.with_program(faulty.OffByOne)(OPTIONS), address, connect)
    assert any(name.startswith("transparency") for name in failures(beside))


@pytest.mark.parametrize(("name", "status"), [("vendor", 0), ("vendor-off-by-one", 1)])
def test_command_examines_an_installed_backend(
    name: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vendor installs an entry point and runs the command: table, JSON, exit status."""
    metadata = tmp_path / "site" / "vendor_npu-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor-npu\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[npu_server.backends]\nvendor = faulty_backends:VendorBackend\n"
        "vendor-off-by-one = installed_fault:Backend\n"
    )
    (tmp_path / "site" / "installed_fault.py").write_text(
        "from faulty_backends import OffByOne, with_program\nBackend = with_program(OffByOne)\n"
    )
    paths = [str(metadata.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    command = [sys.executable, "-m", "npu_server", "conformance", "--backend", name, "--json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert re.search(r"│ Conv +│ passed +│", done.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] is (status == 0)
    worst = {o["op"]: o["max_lsb"] for o in found["operators"] if o["elements"]}
    assert worst["Mul"] == status
    assert max(lsb for op, lsb in worst.items() if op != "Mul") == 0


def test_nothing_to_examine_is_a_wrong_call() -> None:
    """The message names both flags."""
    command = [sys.executable, "-m", "npu_server", "conformance"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "give --backend NAME, --endpoint ADDRESS or both" in done.stderr
