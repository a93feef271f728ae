"""Writes the golden vectors: `python tests/golden/make_golden.py`.

`cases.safetensors` holds models and inputs, and one file a profile what `reference` makes of them, so that
whoever judges them needs nothing of ours. `arithmetic.json` holds the version of the arithmetic and a digest
of each case's tensors, for every shipped profile. Write them anew only when a profile's arithmetic was wrong,
and say in the commit which judge told so.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from npu_server.backends.reference import ReferenceBackend
from npu_server.conformance.cases import all_cases
from npu_server.conformance.graphs import codes, range_variants
from npu_server.conformance.targets import LocalTarget, run_all
from npu_server.numerics.profile import list_profiles
from npu_server.numerics.version import ARITHMETIC_VERSION
from npu_server.seam import BackendOptions
from npu_wire.errors import UnsupportedModel
from npu_wire.layer_map import Int8Array

FOLDER = Path(__file__).parent
RECORD = FOLDER / "arithmetic.json"
PROFILES = ("tflm", "onnxruntime", "pow2-trunc", "acc16")
"""Those whose tensors are kept; of the others only digests are."""

Cases = Mapping[str, Mapping[str, np.ndarray]]


def outputs_of(profile: str, given: Cases, about: Mapping[str, str]) -> dict[str, dict[str, Int8Array]]:
    """Case -> layer -> what `reference` makes of it; without the cases that the profile refuses."""
    target = LocalTarget(ReferenceBackend(BackendOptions(profile=profile)))
    outputs = {}
    for case, tensors in given.items():
        try:
            session = target.compile(tensors["model"].tobytes(), json.loads(about[case])["ranges"])
        except UnsupportedModel:
            continue
        outputs[case] = run_all(session, tensors["input"])
    return outputs


def digest(tensors: Mapping[str, Int8Array]) -> str:
    """Of names, shapes and codes."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(f"{name} {tensors[name].shape} ".encode())
        content.update(np.ascontiguousarray(tensors[name]).tobytes())
    return content.hexdigest()[:16]


def changed_cases(
    recorded: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """What yields other bits than a record says; what the record does not have yet is none of it."""
    return [
        f"{profile}: {case}"
        for profile, cases in recorded.items()
        for case, expected in cases.items()
        if now.get(profile, {}).get(case) != expected
    ]


def main() -> None:
    """Writes all files."""
    about: dict[str, str] = {}
    given: dict[str, dict[str, np.ndarray]] = {}
    for case in (case for group in all_cases().values() for case in group):
        key = f"{case.op}, {case.title}"
        ranges = dict(range_variants(case))["powers of two"]  # ties tell rules of rounding apart
        about[key] = json.dumps({"op": case.op, "ranges": ranges})
        batch = codes(case.seed, case.shape)[2:]  # one random sample and the extremes
        given[key] = {"model": np.frombuffer(case.model(), np.uint8), "input": batch}
    outputs = {profile: outputs_of(profile, given, about) for profile in list_profiles()}
    digests = {p: {case: digest(tensors) for case, tensors in found.items()} for p, found in outputs.items()}
    record = json.loads(RECORD.read_text("utf-8"))
    changed = changed_cases(record["digests"], digests)
    if changed and record["version"] == ARITHMETIC_VERSION:
        sys.exit(
            f"{len(changed)} cases yield other bits than version {ARITHMETIC_VERSION} of the arithmetic, "
            f"such as {changed[0]!r}. If that is right, raise ARITHMETIC_VERSION in "
            "npu_server/numerics/version.py"
        )
    _save("cases", given, about)
    for profile in PROFILES:
        _save(profile, outputs[profile], {"profile": profile})
    RECORD.write_text(
        json.dumps({"version": ARITHMETIC_VERSION, "digests": digests}, indent=1) + "\n", "utf-8"
    )


def _save(name: str, cases: Cases, about: dict[str, str]) -> None:
    tensors = {
        f"{case}|{tensor}": np.ascontiguousarray(array)
        for case, arrays in cases.items()
        for tensor, array in arrays.items()
    }
    save_file(tensors, FOLDER / f"{name}.safetensors", about)


if __name__ == "__main__":
    main()
