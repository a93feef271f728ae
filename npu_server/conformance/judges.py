"""Who says what a backend's operators must yield."""

import importlib
from typing import Any, Protocol

import numpy as np
from onnx import NodeProto
from onnx.reference import ReferenceEvaluator

from npu_server.conformance.graphs import Array, single_node_model
from npu_server.conformance.targets import LocalTarget, run_all
from npu_server.conformance.trials import Trial
from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.registry import create_backend
from npu_server.seam import BackendOptions
from npu_wire.device import Capabilities
from npu_wire.errors import InvalidInput, InvalidProfile
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Float32Array, Int8Array, TensorSpec


class Judge(Protocol):
    """Tells what the layers of a case must yield.

    Attributes:
        name: for the report.
        tolerance_lsb: 0 for one that knows the exact codes; otherwise how far from it still counts as close.
    """

    name: str
    tolerance_lsb: int

    def expect(self, trial: Trial) -> dict[str, Int8Array]:
        """Codes of some or all layers by name, on the scales of the trial's layer map.

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

    def expect(self, trial: Trial) -> dict[str, Int8Array]:
        """Codes of all layers."""
        compiled = self._target.compile(trial.case.model(), trial.ranges)
        specs = {layer.name: layer.output for layer in compiled.layer_map.layers}
        for layer in trial.layer_map.layers if trial.layer_map is not None else ():
            known = specs.get(layer.name)
            if known is not None and _quantization(known) != _quantization(layer.output):
                raise InvalidInput(
                    f"layer '{layer.name}' has scale and zero point {_quantization(layer.output)}; "
                    f"{self.name} says {_quantization(known)}"
                )
        return run_all(compiled, trial.batch)


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
                "Install it: pip install onnxruntime"
            ) from None
        self._runtime: Any = onnxruntime
        self.name = f"onnxruntime float within {tolerance_lsb} LSB"
        self.tolerance_lsb = tolerance_lsb

    def expect(self, trial: Trial) -> dict[str, Int8Array]:
        """Rounded codes of all layers, each computed from the backend's own inputs of that layer."""
        assert trial.layer_map is not None
        (entry,) = trial.layer_map.quantized_inputs
        specs = {layer.name: layer.output for layer in trial.layer_map.layers}
        values: dict[str, Array] = {**trial.case.initializers, entry.name: _real(trial.batch, entry)}
        expected: dict[str, Int8Array] = {}
        for node in trial.case.nodes:
            inputs = {name: values[name] for name in node.input if name}
            outputs = self._run(node, inputs, trial.case.opset)
            for name, real in zip(node.output, outputs, strict=True):
                values[name] = real
                if name in specs:
                    codes = trial.outputs[name]
                    # Where the function has no value, any code is as good.
                    expected[name] = np.where(np.isnan(real), codes, _nearest(real, specs[name]))
                    values[name] = _real(trial.outputs[name], specs[name])
        return expected

    def _run(self, node: NodeProto, inputs: dict[str, Array], opset: int) -> list[Array]:
        if "Sequence" in node.op_type:  # moves data, and ONNX Runtime's models have no such inputs
            moved: Any = ReferenceEvaluator(node).run(None, inputs)
            return list(moved)
        options = self._runtime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        model = single_node_model(node, inputs, opset)
        session = self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        results: list[Array] = session.run(None, inputs)
        return results


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


def _real(codes: Int8Array, spec: TensorSpec) -> Float32Array:
    return (codes.astype(np.float32) - np.float32(spec.zero_point)) * np.float32(spec.scale)


def _nearest(real: Array, spec: TensorSpec) -> Int8Array:
    codes = np.rint(np.nan_to_num(real.astype(np.float64) / spec.scale)) + spec.zero_point
    nearest: Int8Array = np.clip(codes, INT8_MIN, INT8_MAX).astype(np.int8)
    return nearest


def _quantization(spec: TensorSpec) -> tuple[float, int]:
    return float(np.float32(spec.scale)), spec.zero_point
