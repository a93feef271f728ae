"""ONNX Runtime's own quantizer, `quantize_static`, on the same float model with the same ranges."""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from .formulas import Quantization, QuantizedWeights
from .quantizer import Ranges


@dataclass(frozen=True)
class StaticWeights:
    """Weights of a Conv, Gemm or MatMul.

    Attributes:
        quantized: codes (out, ...), scales and bias codes, one for each channel.
        bias: in real numbers, after folding.
        is_unfolded: weight and bias are those of the user's model, nothing was folded into them.
    """

    quantized: QuantizedWeights
    bias: np.ndarray
    is_unfolded: bool


@dataclass(frozen=True)
class StaticNetwork:
    """What `quantize_static` decided, by value name."""

    tensors: Mapping[str, Quantization]
    weights: Mapping[str, StaticWeights]


def quantize(model: bytes, ranges: Ranges, per_channel: bool) -> StaticNetwork:
    """Batch norm and constants folded by ONNX Runtime's optimizer, then quantized in QDQ format.

    Args:
        model: float ONNX model.
        ranges: (min, max) by value name; rounded to float32, as that quantizer keeps them.
        per_channel: one weight scale an output channel.
    """
    spans = {name: tuple(np.float32(end) for end in span) for name, span in ranges.items()}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        given, prepared, result, cache = (Path(folder) / name for name in ("a", "b", "c", "ranges"))
        given.write_bytes(model)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, spans), cache)
        quantize_static(
            prepared,
            result,
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibration_cache_path=cache,
            extra_options={"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
        )
        floats = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(prepared).graph.initializer}
        own = {tensor.name for tensor in ModelProto.FromString(model).graph.initializer}
        return _read(onnx.load(result), floats, own)


def _read(model: ModelProto, floats: Mapping[str, np.ndarray], own: set[str]) -> StaticNetwork:
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    tensors = {
        _value_name(node.input[0]): Quantization(
            np.float32(values[node.input[1]]), int(values[node.input[2]])
        )
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    weights = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or not _plain(node):
            continue
        sources = [producers.get(name) for name in node.input[1:]]
        if any(source is None or source.input[0] not in values for source in sources):
            continue
        names = [source.input[0].removesuffix("_quantized") for source in sources if source is not None]
        arrays = [[values[name] for name in s.input] for s in sources if s is not None]
        codes, scales, zero_points = arrays[0]
        assert not zero_points.any()
        turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _field(node, "transB", 0))
        codes = codes.T if turned else codes
        out = len(codes)
        bias = arrays[1][0] if len(arrays) > 1 else np.zeros(out, np.int64)
        quantized = QuantizedWeights(codes, np.broadcast_to(scales, (out,)), bias.astype(np.int64))
        real = floats[names[1]] if len(names) > 1 else np.zeros(out, np.float32)
        weights[_value_name(node.output[0])] = StaticWeights(quantized, real, set(names) <= own)
    return StaticNetwork(tensors, weights)


def _value_name(name: str) -> str:
    """The quantizer renames what it puts before the network's output."""
    return name.removesuffix("_QuantizeLinear_Input")


def _field(node: NodeProto, name: str, default: float) -> float:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _plain(node: NodeProto) -> bool:
    """Factors of a Gemm stay with the node there; here they are part of the weights."""
    return _field(node, "alpha", 1.0) == _field(node, "beta", 1.0) == 1.0


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
