"""Who says what a backend's operators must yield."""

import importlib
from typing import Any, Protocol

import numpy as np

from npu_server.backends.base import Backend, BackendOptions, Capabilities, Ranges
from npu_server.conformance.graphs import INPUT, OUTPUT, Case
from npu_server.conformance.targets import LocalTarget, run_all
from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.registry import create_backend
from npu_wire.errors import InvalidInput, InvalidProfile
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array, LayerMap, TensorSpec

Outputs = dict[str, Int8Array]


class Judge(Protocol):
    """Tells what the layers of a case must yield.

    Attributes:
        name: for the report.
        tolerance_lsb: 0 for one that knows the exact codes; otherwise how far from it still counts as close.
    """

    name: str
    tolerance_lsb: int

    def expect(self, case: Case, ranges: Ranges, batch: Int8Array, layer_map: LayerMap) -> Outputs:
        """Codes of some or all layers, by name, on the scales that `layer_map` tells.

        Raises:
            UnsupportedModel: it cannot run the case either.
            InvalidInput: the layer map contradicts what the judge knows.
        """
        ...


class ReferenceJudge:
    """`reference` with the same profile: every layer, every bit.

    Args:
        profile: name or path.
    """

    tolerance_lsb = 0

    def __init__(self, profile: str) -> None:
        self._target = LocalTarget(create_backend("reference", BackendOptions(profile=profile)))
        self.name = f"reference ({profile})"

    def expect(self, case: Case, ranges: Ranges, batch: Int8Array, layer_map: LayerMap) -> Outputs:
        """Codes of all layers."""
        session = self._target.compile(case.model(), ranges)
        specs = {layer.name: layer.output for layer in session.layer_map.layers}
        for layer in layer_map.layers:
            known = specs.get(layer.name)
            if known is not None and _quantization(known) != _quantization(layer.output):
                raise InvalidInput(
                    f"layer '{layer.name}' has scale and zero point {_quantization(layer.output)}; "
                    f"{self.name} says {_quantization(known)}"
                )
        return run_all(session, batch)


class FloatJudge:
    """ONNX Runtime in float on the dequantized input: closeness of the output, never equality.

    Args:
        tolerance_lsb: largest distance from the rounded float result.

    Raises:
        InvalidInput: ONNX Runtime is not installed.
    """

    def __init__(self, tolerance_lsb: int) -> None:
        try:
            onnxruntime = importlib.import_module("onnxruntime")
        except ImportError:
            raise InvalidInput(
                "a backend with arithmetic of its own is compared with ONNX Runtime, which is missing. "
                "Install it: pip install 'npu-in-the-loop[onnxruntime]'"
            ) from None
        self._runtime: Any = onnxruntime
        self.name = f"onnxruntime float within {tolerance_lsb} LSB"
        self.tolerance_lsb = tolerance_lsb

    def expect(self, case: Case, ranges: Ranges, batch: Int8Array, layer_map: LayerMap) -> Outputs:
        """Rounded codes of the output."""
        options = self._runtime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = self._runtime.InferenceSession(case.model(), options, providers=["CPUExecutionProvider"])
        entry, output = layer_map.input, layer_map.output
        x = (batch.astype(np.float32) - entry.zero_point) * np.float32(entry.scale)
        (real,) = session.run([OUTPUT], {INPUT: x})
        codes = np.rint(real.astype(np.float64) / output.scale) + output.zero_point
        return {output.name: np.clip(codes, INT8_MIN, INT8_MAX).astype(np.int8)}


def choose_judge(capabilities: Capabilities, profile: str, tolerance_lsb: int) -> Judge:
    """`reference` for arithmetic that is one of our profiles; ONNX Runtime's float for any other.

    Args:
        capabilities: of the backend.
        profile: profile that the user named, also the path of a file.
        tolerance_lsb: for the latter.
    """
    for name in dict.fromkeys((profile, capabilities.fingerprint.profile, *list_profiles())):
        try:
            known = load_profile(name).hash
        except InvalidProfile:
            continue
        if known == capabilities.fingerprint.profile_hash:
            return ReferenceJudge(name)
    return FloatJudge(tolerance_lsb)


def opened(backend: Backend) -> Backend:
    """The backend after `open` and a good `probe`.

    Raises:
        InvalidInput: it is not well.
    """
    backend.open()
    health = backend.probe()
    if not health.ok:
        raise InvalidInput(f"the device is not well: {health.detail}")
    return backend


def _quantization(spec: TensorSpec) -> tuple[float, int]:
    return float(np.float32(spec.scale)), spec.zero_point
