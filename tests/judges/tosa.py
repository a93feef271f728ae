"""The TOSA reference model as judge: the layer is authored as TOSA operators around RESCALE."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tosa_reference_model
import tosa_serializer as ts

from npu_server.compile import graph as g
from npu_server.numerics.scales import Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

from .layers import Job, JudgedLayer, Unjudged, channels_first, channels_last, constants_as_activations


@dataclass(frozen=True)
class TosaJudge:
    """TOSA with one of its rounding modes."""

    name: str
    double: bool

    def run(self, judged: JudgedLayer, inputs: list[Int8Array]) -> Int8Array:
        """The layer's output by the engine, logical order; see `Judge.run`."""
        return self.run_all([(judged, inputs)])[0]

    def run_all(self, jobs: list[Job]) -> list[Int8Array]:
        """The outputs of several layers that stand side by side in one graph; see `Judge.run_all`."""
        graph = ts.TosaSerializer("", ts.ConstMode.EMBED)
        feeds = []
        for judged, inputs in (constants_as_activations(*job) for job in jobs):
            images = [channels_last(x) for x in inputs]
            feeds += images
            writer = _WRITERS.get(type(judged.layer.operator).__name__)
            if writer is None:
                raise Unjudged(f"no TOSA graph for {type(judged.layer.operator).__name__}")
            author = _Author(graph, judged, images, self.double)
            author.finish(writer(author, judged.layer.operator))
        outputs, status = tosa_reference_model.run(graph.serialize(), feeds)
        if "VALID" not in str(status).upper() or "UN" in str(status).upper():
            raise Unjudged(f"the TOSA reference model says {status}")
        return [
            _logical(np.asarray(output).view(np.int8), (len(inputs[0]), *judged.layer.shape))
            for (judged, inputs), output in zip(jobs, outputs, strict=True)
        ]


def _logical(result: Int8Array, shape: tuple[int, ...]) -> Int8Array:
    """Channels first again, where the graph had them last."""
    if len(shape) == 4:
        return channels_first(result.reshape(shape[0], shape[2], shape[3], shape[1]))
    return result.reshape(shape)


@dataclass(frozen=True)
class _Value:
    """A tensor of the TOSA graph."""

    name: str
    shape: tuple[int, ...]


class _Author:
    """One layer on its way into a TOSA graph; images have channels last."""

    def __init__(
        self, graph: ts.TosaSerializer, judged: JudgedLayer, images: list[Int8Array], double: bool
    ) -> None:
        self.graph = graph
        self.judged, self.layer = judged, judged.layer
        self.mode = ts.RoundingMode.DOUBLE_ROUND if double else ts.RoundingMode.SINGLE_ROUND
        self.inputs = [
            _Value(self.graph.addPlaceholder(list(x.shape), ts.DType.INT8, None).name, x.shape)
            for x in images
        ]

    def constant(self, values: object, dtype: type[np.signedinteger]) -> str:
        array = np.atleast_1d(np.asarray(values, dtype))
        kinds = {np.int8: ts.DType.INT8, np.int32: ts.DType.INT32}
        return str(self.graph.addConst(list(array.shape), kinds[dtype], array).name)

    def shape(self, values: list[int]) -> str:
        return str(self.graph.addConst([len(values)], ts.DType.SHAPE, values).name)

    def operator(
        self, op: str, inputs: list[str], shape: tuple[int, ...], dtype: type, **fields: object
    ) -> _Value:
        """Adds an operator; its attribute's name is that of the operator in camel case."""
        kinds = {np.int8: ts.DType.INT8, np.int32: ts.DType.INT32}
        output = self.graph.addIntermediate(list(shape), kinds[dtype]).name
        attribute = ts.TosaSerializerAttribute()
        camel = {"CONV2D": "Conv2d", "DEPTHWISE_CONV2D": "DepthwiseConv2d", "MATMUL": "MatMul"}
        camel |= {"AVG_POOL2D": "AvgPool2d", "MAX_POOL2D": "MaxPool2d"}
        name = camel.get(op) or "".join(word.capitalize() for word in op.split("_"))
        getattr(attribute, f"{name}Attribute")(**fields)
        self.graph.addOperator(getattr(ts.Op, op), inputs, [output], attribute)
        return _Value(output, shape)

    def rescale(
        self, x: _Value, dtype: type, ratios: object, zero_point: int, to: type, out_zero_point: int = 0
    ) -> _Value:
        """RESCALE by ratios (one, or one a channel) as QuantizeMultiplier encodes them."""
        fraction, exponent = np.frexp(np.atleast_1d(np.asarray(ratios, np.float64)))
        mantissa = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
        exponent, mantissa = exponent + (mantissa == 2**31), np.where(mantissa == 2**31, 2**30, mantissa)
        return self.rescale_by(x, dtype, mantissa, 31 - exponent, zero_point, to, out_zero_point)

    def rescale_by(
        self,
        x: _Value,
        dtype: type,
        mantissa: np.ndarray,
        shift: np.ndarray,
        zero_point: int,
        to: type,
        out_zero_point: int = 0,
    ) -> _Value:
        if (shift < 2).any() or (shift > 62).any():
            raise Unjudged("TOSA's RESCALE shifts by 2 to 62")
        names = [
            x.name,
            self.constant(mantissa, np.int32),
            self.constant(shift, np.int8),
            self.constant(zero_point, dtype),
            self.constant(out_zero_point, to),
        ]
        fields = {"input_unsigned": False, "output_unsigned": False, "per_channel": len(mantissa) > 1}
        return self.operator("RESCALE", names, x.shape, to, scale32=True, rounding_mode=self.mode, **fields)

    def requantized(self, x: _Value, ratios: object) -> _Value:
        """INT32 -> the layer's INT8 output."""
        return self.rescale(x, np.int32, ratios, 0, np.int8, self.layer.output.zero_point)

    def finish(self, y: _Value) -> None:
        """Clamps; the clamp's output is the graph's."""
        low, high = self.layer.output.low, self.layer.output.high
        output = self.graph.addOutput(list(y.shape), ts.DType.INT8).name
        attribute = ts.TosaSerializerAttribute()
        ends = ([n & 0xFF] for n in (max(low, INT8_MIN), min(high, INT8_MAX)))
        attribute.ClampAttribute(*ends, ts.NanPropagationMode.PROPAGATE)
        self.graph.addOperator(ts.Op.CLAMP, [y.name], [output], attribute)


def _conv(a: _Author, operator: g.Conv) -> _Value:
    x, weights, window = a.inputs[0], a.judged.prepared.weights, operator.window
    if len(x.shape) != 4:
        raise Unjudged("a convolution of single numbers")
    if operator.stuffing is not None:
        raise Unjudged("this harness authors no TOSA TRANSPOSE_CONV2D")
    depthwise = operator.groups == x.shape[3] and operator.groups > 1
    if operator.groups > 1 and not depthwise:
        raise Unjudged("TOSA has no grouped convolution")
    stored = weights.codes.transpose(0, 2, 3, 1)
    if depthwise:
        multiplier = len(weights.codes) // operator.groups
        split = weights.codes.reshape(operator.groups, multiplier, *window.size)
        stored = split.transpose(2, 3, 0, 1)
    top, left, bottom, right = window.pads
    height, width = a.layer.shape[1:]
    reach = [(k - 1) * d + 1 for k, d in zip(window.size, window.dilations, strict=True)]
    # TOSA wants the windows to end with the padding.
    bottom = (height - 1) * window.strides[0] + reach[0] - x.shape[1] - top
    right = (width - 1) * window.strides[1] + reach[1] - x.shape[2] - left
    if bottom < 0 or right < 0:
        raise Unjudged("TOSA wants windows that cover the whole input")
    names = [x.name, a.constant(stored, np.int8), a.constant(weights.bias, np.int32)]
    names += [a.constant(a.layer.sources[0].zero_point, np.int8), a.constant(0, np.int8)]
    shape = (x.shape[0], height, width, a.layer.shape[0])
    total = a.operator(
        "DEPTHWISE_CONV2D" if depthwise else "CONV2D",
        names,
        shape,
        np.int32,
        pad=[top, bottom, left, right],
        stride=list(window.strides),
        dilation=list(window.dilations),
        local_bound=False,
        acc_type=ts.DType.INT32,
    )
    return a.requantized(total, weights.scales * a.layer.sources[0].scale / a.layer.scale)


def _gemm(a: _Author, operator: g.Gemm) -> _Value:
    """A convolution of images of one pixel."""
    if operator.axis != -1:
        raise Unjudged("this harness authors products over the last axis")
    x, weights = a.inputs[0], a.judged.prepared.weights
    rows = int(np.prod(x.shape[:-1]))
    image = a.operator(
        "RESHAPE", [x.name, a.shape([rows, 1, 1, x.shape[-1]])], (rows, 1, 1, x.shape[-1]), np.int8
    )
    names = [image.name, a.constant(weights.codes[:, None, None], np.int8)]
    names += [a.constant(weights.bias, np.int32), a.constant(a.layer.sources[0].zero_point, np.int8)]
    total = a.operator(
        "CONV2D",
        [*names, a.constant(0, np.int8)],
        (rows, 1, 1, len(weights.bias)),
        np.int32,
        pad=[0] * 4,
        stride=[1, 1],
        dilation=[1, 1],
        local_bound=False,
        acc_type=ts.DType.INT32,
    )
    return a.requantized(total, weights.scales * a.layer.sources[0].scale / a.layer.scale)


def _joint(operands: list[_Value]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(x.shape for x in operands))


def _add(a: _Author, operator: g.Add | g.Sub) -> _Value:
    """As TFLite's ADD is lowered to TOSA: operands at twice the larger scale with 20 bits more."""
    common = 2 * max(source.scale for source in a.layer.sources)
    operands = [
        a.rescale(x, np.int8, source.scale / common * 2.0**20, source.zero_point, np.int32)
        for x, source in zip(a.inputs, a.layer.sources, strict=True)
    ]
    name = "ADD" if isinstance(operator, g.Add) else "SUB"
    total = a.operator(name, [x.name for x in operands], _joint(operands), np.int32)
    return a.requantized(total, common / (2.0**20 * a.layer.scale))


def _mul(a: _Author, operator: g.Mul) -> _Value:
    operands = [
        a.rescale(x, np.int8, 1.0, source.zero_point, np.int32)
        for x, source in zip(a.inputs, a.layer.sources, strict=True)
    ]
    names = [*(x.name for x in operands), a.constant(0, np.int8)]
    product = a.operator("MUL", names, _joint(operands), np.int32)
    first, second = a.layer.sources
    return a.requantized(product, first.scale * second.scale / a.layer.scale)


def _concat(a: _Author, operator: g.Concat) -> _Value:
    target, parts = Quantization(a.layer.scale, a.layer.output.zero_point), []
    for x, source in zip(a.inputs, a.layer.sources, strict=True):
        if source != target:
            ratio = source.scale / target.scale
            x = a.rescale(x, np.int8, ratio, source.zero_point, np.int8, target.zero_point)
        parts.append(x)
    axis = {1: 3, 2: 1, 3: 2}[operator.axis] if len(parts[0].shape) == 4 else operator.axis
    shape = list(parts[0].shape)
    shape[axis] = sum(x.shape[axis] for x in parts)
    return a.operator("CONCAT", [x.name for x in parts], tuple(shape), np.int8, axis=axis)


def _extreme(a: _Author, operator: g.Extreme) -> _Value:
    """In INT32, which TOSA compares: each operand in the output's scale, saturated in the end."""
    if len(a.inputs) != 2:
        raise Unjudged("TOSA compares two tensors")
    operands = [
        a.rescale(x, np.int8, source.scale / a.layer.scale, source.zero_point, np.int32)
        for x, source in zip(a.inputs, a.layer.sources, strict=True)
    ]
    names, shape = [x.name for x in operands], _joint(operands)
    propagate = {"nan_mode": ts.NanPropagationMode.PROPAGATE}
    chosen = a.operator("MAXIMUM" if operator.largest else "MINIMUM", names, shape, np.int32, **propagate)
    return a.requantized(chosen, 1.0)


def _pool(a: _Author, operator: g.MaxPool | g.AveragePool) -> _Value:
    x, window = a.inputs[0], operator.window
    top, left, bottom, right = window.pads
    height, width = a.layer.shape[1:]
    bottom = (height - 1) * window.strides[0] + window.size[0] - x.shape[1] - top
    right = (width - 1) * window.strides[1] + window.size[1] - x.shape[2] - left
    if min(bottom, right) < 0 or window.dilations != (1, 1):
        raise Unjudged("TOSA wants windows that cover the whole input")
    if isinstance(operator, g.AveragePool) and operator.count_pads:
        raise Unjudged("TOSA's average pool does not count padding")
    if max(top, bottom) >= window.size[0] or max(left, right) >= window.size[1]:
        raise Unjudged("TOSA wants pads below the kernel's size")
    fields = {
        "kernel": list(window.size),
        "stride": list(window.strides),
        "pad": [top, bottom, left, right],
    }
    shape = (x.shape[0], height, width, x.shape[3])
    if isinstance(operator, g.MaxPool):
        return a.operator(
            "MAX_POOL2D", [x.name], shape, np.int8, **fields, nan_mode=ts.NanPropagationMode.PROPAGATE
        )
    zero = a.constant(a.layer.sources[0].zero_point, np.int8)
    names = [x.name, zero, a.constant(a.layer.output.zero_point, np.int8)]
    return a.operator("AVG_POOL2D", names, shape, np.int8, **fields, acc_type=ts.DType.INT32)


def _mean(a: _Author, operator: g.Mean) -> _Value:
    """As TFLite's MEAN: the sum, rescaled by a multiplier in which 1 / count is folded (`reduce.h`)."""
    source = a.layer.sources[0]
    total = a.rescale(a.inputs[0], np.int8, 1.0, source.zero_point, np.int32)
    n, height, width, channels = total.shape
    total = a.operator("REDUCE_SUM", [total.name], (n, 1, width, channels), np.int32, axis=1)
    total = a.operator("REDUCE_SUM", [total.name], (n, 1, 1, channels), np.int32, axis=2)
    fraction, exponent = np.frexp(source.scale / a.layer.scale)
    count = height * width
    bits = max(0, min(count.bit_length() - 1, 32, 31 + int(exponent)))
    mantissa = (int(np.floor(fraction * 2.0**31 + 0.5)) << bits) // count
    shift = np.array([31 - int(exponent) + bits])
    zero_point = a.layer.output.zero_point
    return a.rescale_by(total, np.int32, np.array([mantissa]), shift, 0, np.int8, zero_point)


def _pad(a: _Author, operator: g.Pad) -> _Value:
    x, pads = a.inputs[0], [(0, 0), *operator.pads[1:], operator.pads[0]]
    names = [x.name, a.shape([n for pair in pads for n in pair])]
    names.append(a.constant(a.layer.output.zero_point, np.int8))
    shape = tuple(n + sum(pair) for n, pair in zip(x.shape, pads, strict=True))
    return a.operator("PAD", names, shape, np.int8)


def _clamp(a: _Author, operator: g.Clamp) -> _Value:
    source = a.layer.sources[0]
    if source == Quantization(a.layer.scale, a.layer.output.zero_point):
        return a.inputs[0]
    ratio = source.scale / a.layer.scale
    return a.rescale(a.inputs[0], np.int8, ratio, source.zero_point, np.int8, a.layer.output.zero_point)


_WRITERS: dict[str, Callable[[_Author, g.Operator], _Value]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "Add": _add,
    "Sub": _add,
    "Mul": _mul,
    "Concat": _concat,
    "Extreme": _extreme,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Mean": _mean,
    "Pad": _pad,
    "Clamp": _clamp,
}

JUDGES = (TosaJudge("TOSA single rounding", False), TosaJudge("TOSA double rounding", True))
