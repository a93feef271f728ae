"""The golden vectors hold on both backends, and ONNX Runtime holds to those of its profile."""

import json
from pathlib import Path

import make_golden
import numpy as np
import pytest
from judges.layers import Unjudged, compile_layers
from judges.onnx_qlinear import OnnxRuntimeJudge
from make_golden import PROFILES, RECORD, changed_cases, digest, outputs_of
from safetensors import safe_open

from npu_server.compile.graph import AveragePool, Conv, MaxPool
from npu_server.conformance.targets import LocalTarget, run_all
from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.numerics.version import ARITHMETIC_VERSION
from npu_server.registry import create_backend
from npu_server.seam import BackendOptions

FOLDER = Path(__file__).parent
REMEDY = (
    "Profiles yield other bits than their hash promises. If that is right, raise ARITHMETIC_VERSION in "
    "npu_server/numerics/version.py and run tests/golden/make_golden.py"
)


def read(name: str) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """A file: case -> tensor name -> tensor, and its metadata."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with safe_open(FOLDER / f"{name}.safetensors", "numpy") as file:
        for key in file.keys():  # noqa: SIM118  # the file is no mapping
            case, tensor = key.rsplit("|", 1)
            cases.setdefault(case, {})[tensor] = file.get_tensor(key)
        return cases, file.metadata()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_golden_vectors_hold(backend: str, profile: str) -> None:
    """Every tensor of every case, bit for bit."""
    given, about = read("cases")
    golden, _ = read(profile)
    target = LocalTarget(create_backend(backend, BackendOptions(profile=profile, threads=1)))
    compared = 0
    for case, expected in golden.items():
        session = target.compile(given[case]["model"].tobytes(), json.loads(about[case])["ranges"])
        outputs = run_all(session, given[case]["input"])
        assert session.layer_map.tensors[session.layer_map.outputs[0]].name in expected
        for name in outputs.keys() & expected.keys():
            np.testing.assert_array_equal(outputs[name], expected[name], err_msg=f"{case}: {name}")
            compared += expected[name].size
    assert compared > 100_000


def test_onnxruntime_holds_to_the_vectors_of_its_profile() -> None:
    """Its integer kernels, layer by layer on the golden inputs of each, agree on every element."""
    given, about = read("cases")
    golden, _ = read("onnxruntime")
    profile, judge, compared, operators = load_profile("onnxruntime"), OnnxRuntimeJudge(), 0, set()
    for case, expected in golden.items():
        model, ranges = given[case]["model"].tobytes(), json.loads(about[case])["ranges"]
        values = {"x": given[case]["input"]} | expected
        for judged in compile_layers(model, ranges, profile):
            operator = judged.layer.operator
            if isinstance(operator, Conv) and (len(judged.layer.shape) != 3 or operator.stuffing is not None):
                continue  # ONNX Runtime has integer convolutions of images, and no transposed ones
            if isinstance(operator, AveragePool | MaxPool) and any(operator.window.overhang):
                continue  # the judge is not authored with ceil_mode
            try:
                result = judge.run(judged, [values[name] for name in judged.layer.spec.inputs])
            except Unjudged:
                continue
            name = judged.layer.spec.name
            np.testing.assert_array_equal(result, expected[name], err_msg=f"{case}: {name}")
            compared += result.size
            operators.add(judged.layer.spec.op)
    assert {"Conv", "Gemm", "Add", "Mul", "Concat", "Mean", "AveragePool"} <= operators
    assert compared > 20_000


def test_every_profile_yields_what_its_version_yielded() -> None:
    """A rule that was changed without a new version of the arithmetic would leave hashes equal."""
    record, (given, about) = json.loads(RECORD.read_text("utf-8")), read("cases")
    assert record["version"] == ARITHMETIC_VERSION, REMEDY
    assert record["digests"].keys() == set(list_profiles()), REMEDY
    for profile in list_profiles():
        found = {case: digest(tensors) for case, tensors in outputs_of(profile, given, about).items()}
        assert changed_cases({profile: record["digests"][profile]}, {profile: found}) == [], REMEDY


@pytest.mark.parametrize("profile", PROFILES)
def test_kept_tensors_are_those_of_the_version(profile: str) -> None:
    """Golden files that were changed by hand, or without a new version, do not fit the record."""
    record, (golden, _) = json.loads(RECORD.read_text("utf-8")), read(profile)
    assert {case: digest(tensors) for case, tensors in golden.items()} == record["digests"][profile], REMEDY


def test_new_bits_are_not_written_under_an_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make_golden.py` says what changed and what to do, and writes nothing; with a new version it writes."""
    record = json.loads(RECORD.read_text("utf-8"))
    record["digests"]["tosa-single"]["Add, broadcast"] = "0" * 16
    monkeypatch.setattr(make_golden, "FOLDER", tmp_path)
    monkeypatch.setattr(make_golden, "RECORD", tmp_path / RECORD.name)
    make_golden.RECORD.write_text(json.dumps(record), "utf-8")
    with pytest.raises(
        SystemExit, match=r"1 cases yield other bits .*'tosa-single: Add, broadcast'.* raise ARITH"
    ):
        make_golden.main()
    assert [path.name for path in tmp_path.iterdir()] == [RECORD.name]
    monkeypatch.setattr(make_golden, "ARITHMETIC_VERSION", ARITHMETIC_VERSION + 1)
    make_golden.main()
    assert json.loads(make_golden.RECORD.read_text("utf-8"))["version"] == ARITHMETIC_VERSION + 1
