"""Writes the golden vectors: `python tests/golden/make_golden.py`.

`cases.safetensors` holds models and inputs, and one file a profile what `reference` makes of them, so that
whoever judges them needs nothing of ours. Write them anew only when a profile's arithmetic was wrong, and say
in the commit which judge told so.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from npu_server.backends.base import BackendOptions
from npu_server.backends.reference import ReferenceBackend
from npu_server.conformance.cases import all_cases
from npu_server.conformance.graphs import codes, range_variants
from npu_server.conformance.targets import LocalTarget, run_all
from npu_wire.errors import UnsupportedModel

FOLDER = Path(__file__).parent
PROFILES = ("tflm", "onnxruntime", "pow2-trunc", "acc16")


def main() -> None:
    """Writes all files."""
    about, tensors = {}, {}
    for case in (case for group in all_cases().values() for case in group):
        key = f"{case.op}, {case.title}"
        ranges = dict(range_variants(case))["powers of two"]  # ties tell rules of rounding apart
        about[key] = json.dumps({"op": case.op, "ranges": ranges})
        tensors[f"{key}|model"] = np.frombuffer(case.model(), np.uint8)
        tensors[f"{key}|input"] = codes(case.seed, case.shape)[2:]  # one random sample and the extremes
    save_file(tensors, FOLDER / "cases.safetensors", about)
    for profile in PROFILES:
        target = LocalTarget(ReferenceBackend(BackendOptions(profile=profile)))
        outputs = {}
        for key, text in about.items():
            try:
                session = target.compile(tensors[f"{key}|model"].tobytes(), json.loads(text)["ranges"])
            except UnsupportedModel:
                continue
            for name, output in run_all(session, tensors[f"{key}|input"]).items():
                outputs[f"{key}|{name}"] = np.ascontiguousarray(output)
        save_file(outputs, FOLDER / f"{profile}.safetensors", {"profile": profile})


if __name__ == "__main__":
    main()
