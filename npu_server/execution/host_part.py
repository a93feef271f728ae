"""Parts of a network that the NPU's host runs in ONNX Runtime, the same for every backend.

Their bits are the runtime's, not the chip's. One thread and no arena of its own: so that they do not depend
on the server's settings, and what is free goes back to the system.
"""

import re
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from npu_server.compile.graph import HostInput, HostPart
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared
from npu_wire.errors import DeviceFault, InvalidInput, UnsupportedModel
from npu_wire.layer_map import Array, Float32Array, InputSpec, Int8Array, LayerMap, TensorSpec
from npu_wire.quantize import dequantize

_ROUNDINGS = 2  # codes by which float sums of another order may differ
_SESSIONS: WeakKeyDictionary[HostPart, Any] = WeakKeyDictionary()


class MixedSamples(Exception):
    """What a sample yields depends on the others of its batch, the way that they lie in the value."""

    def __init__(self, name: str, message: str) -> None:
        """Takes the name of the value that the part computes, and what to tell a user."""
        super().__init__(message)
        self.name = name


def open_part(layer: Layer, operator: HostPart) -> None:
    """Makes a part ready to run; a program keeps it as long as it lives.

    Raises:
        UnsupportedModel: ONNX Runtime does not take it, or is not installed.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]  # only for models with host parts
    except ImportError as error:
        raise UnsupportedModel(
            f"{_called(layer)} is computed by the NPU's host, which needs ONNX Runtime: "
            "pip install 'npu-in-the-loop[server]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        _SESSIONS[operator] = onnxruntime.InferenceSession(operator.model, options, ["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, one for each status
        raise UnsupportedModel(f"{_called(layer)}: ONNX Runtime refuses it: {_first_line(error)}") from error


def run_part(layer: Layer, operator: HostPart, prepared: Prepared, inputs: list[Array]) -> Int8Array:
    """Dequantizes, runs the float model, quantizes (`npu_wire.quantize`'s rule).

    Args:
        layer: the layer.
        operator: what it computes.
        prepared: its constants.
        inputs: codes, shape (n, ...) in logical order, and raw inputs as they are.

    Returns:
        Codes, shape (n, *layer.shape); what is no number becomes the code of 0.

    Raises:
        InvalidInput: ONNX Runtime cannot compute with these values (a token id that does not exist).
        DeviceFault: the part yields another shape than was compiled.
    """
    sources = iter(layer.sources)
    feeds: dict[str, Array] = dict(prepared.feeds)
    samples = 0
    for given, array in zip(operator.inputs, inputs, strict=True):
        if given.axis is None:
            feeds[given.name] = array
            continue
        source = next(sources)
        samples = len(array)
        real = dequantize(array, source.scale, source.zero_point)
        feeds[given.name] = _in_onnx_order(real, given)
    samples = samples or _samples(operator, inputs)
    for name, base, step in operator.sizes:
        feeds[name] = np.array(base, np.int64) + samples * np.array(step, np.int64)
    try:
        (value,) = _SESSIONS[operator].run(None, feeds)
    except Exception as error:  # classes of its own, one for each status
        raise InvalidInput(f"{_called(layer)}: ONNX Runtime cannot run it: {_first_line(error)}") from error
    outer = layer.spec.output.outer
    if value.size != samples * int(np.prod(layer.shape)):
        raise DeviceFault(f"{_called(layer)} yields shape {value.shape}, compiled for {layer.shape}")
    ordered = np.swapaxes(value.reshape(outer, samples, -1), 0, 1).reshape(samples, *layer.shape)
    return _quantized(layer, ordered)


def refuse_mixed_samples(layer: Layer, operator: HostPart, prepared: Prepared, layer_map: LayerMap) -> None:
    """Tries whether each sample's result is its own: a batch may be computed in parts, of any size.

    Two random samples are computed together and one by one; a rounding of the float sums may differ.

    Raises:
        MixedSamples: what a sample yields depends on the others of its batch.
    """
    rng = np.random.default_rng(0)
    specs: dict[str, InputSpec] = {spec.name: spec for spec in layer_map.inputs}
    specs.update(layer_map.tensors)
    pair = [_drawn(specs[given.tensor], rng) for given in operator.inputs]
    batched = [getattr(specs[given.tensor], "batched", True) for given in operator.inputs]

    def part(samples: slice) -> Int8Array:
        chosen = [x[samples] if b else x for x, b in zip(pair, batched, strict=True)]
        return run_part(layer, operator, prepared, chosen)

    try:
        together, alone = part(slice(2)), np.concatenate([part(slice(1)), part(slice(1, 2))])
    except InvalidInput:
        return  # random values are not for it; what it says then is for the batch that brings such
    if np.abs(together.astype(np.int16) - alone).max(initial=0) > _ROUNDINGS:
        raise MixedSamples(
            layer.spec.name,
            f"{_called(layer)}: a sample's result depends on the others of its batch, and batches may be "
            "computed in parts; compute statistics of a batch (batch norm without running ones, a maximum or "
            "mean over everything, sorting along the batch) outside of the model, or freeze them",
        )


def _drawn(spec: InputSpec, rng: np.random.Generator) -> Array:
    """Two samples of a tensor, or an input without samples."""
    if isinstance(spec, TensorSpec):
        return rng.integers(-128, 128, (2, *spec.shape), np.int8)
    shape = (2, *spec.shape) if spec.batched else spec.shape
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    return rng.integers(0, 2, shape).astype(spec.dtype)


def _quantized(layer: Layer, real: Float32Array) -> Int8Array:
    with np.errstate(all="ignore"):
        steps = np.rint(real / np.float32(layer.scale)) + np.float32(layer.output.zero_point)
    low, high, zero = layer.output.low, layer.output.high, layer.output.zero_point
    bounded = np.clip(np.nan_to_num(steps, nan=zero, posinf=high, neginf=low), low, high)
    return np.ascontiguousarray(bounded.astype(np.int8))


def _in_onnx_order(x: Float32Array, given: HostInput) -> Float32Array:
    """An NPU's tensor, batch first, as the ONNX value that it holds."""
    shape = [n * len(x) if i == given.axis else n for i, n in enumerate(given.dims)]
    ordered: Float32Array = np.swapaxes(x.reshape(len(x), given.outer, -1), 0, 1).reshape(shape)
    return ordered


def _samples(operator: HostPart, inputs: list[Array]) -> int:
    return next(len(array) for given, array in zip(operator.inputs, inputs, strict=True) if given.outer)


def _called(layer: Layer) -> str:
    return f"host part {layer.spec.name!r} ({', '.join(layer.spec.fused_nodes)[:400]})"


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:400]
