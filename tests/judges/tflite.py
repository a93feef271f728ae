"""TFLM and LiteRT's three sets of kernels as judges: the layer is authored as a .tflite."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from npu_server.compile import graph as g
from npu_server.compile.planning.lowering import Layer
from npu_server.numerics.scales import Quantization, code_of
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

from .layers import Job, JudgedLayer, Unjudged, channels_first, channels_last, constants_as_activations
from .tflite_models import TfliteModel, schema

Engine = Callable[[bytes, list[Int8Array]], list[Int8Array]]


@dataclass(frozen=True)
class TfliteJudge:
    """An engine that reads .tflite models.

    Attributes:
        name: of the engine.
        engine: runs a model.
        bounded_relu_rescales: whether it has a lone RELU6 between two scales.
    """

    name: str
    engine: Engine
    bounded_relu_rescales: bool = True

    def run(self, judged: JudgedLayer, inputs: list[Int8Array]) -> Int8Array:
        """The layer's output by the engine, logical order; see `Judge.run`."""
        return self.run_all([(judged, inputs)])[0]

    def run_all(self, jobs: list[Job]) -> list[Int8Array]:
        """The outputs of several layers that stand side by side in one model; see `Judge.run_all`."""
        shaped = [_as_images_and_rows(*constants_as_activations(*job)) for job in jobs]
        for judged, _ in shaped:
            operator = judged.layer.operator
            if isinstance(operator, g.Clamp) and not self.bounded_relu_rescales and operator.high != np.inf:
                raise Unjudged(f"{self.name} has no lone RELU6 between two scales")
        authored = author(shaped)
        arrays = [_order(judged.layer, x) for judged, inputs in shaped for x in inputs]
        try:
            results = self.engine(authored, arrays)
        except (RuntimeError, ValueError) as error:
            raise Unjudged(f"{self.name} refuses it: {str(error).splitlines()[0]}") from error
        return [
            _logical(shaped_layer.layer, result).reshape(len(inputs[0]), *judged.layer.shape)
            for (judged, inputs), (shaped_layer, _), result in zip(jobs, shaped, results, strict=True)
        ]


def _logical(layer: Layer, result: Int8Array) -> Int8Array:
    """Channels first again, where the engine had them last."""
    if len(layer.shape) != 3 or isinstance(layer.operator, g.MatMul):
        return result
    channels, height, width = layer.shape
    return channels_first(result.reshape(-1, height, width, channels))


def _as_images_and_rows(judged: JudgedLayer, inputs: list[Int8Array]) -> tuple[JudgedLayer, list[Int8Array]]:
    """The same layer for an engine whose images have four axes, and only they.

    A sequence (N, C, L) is an image of one row; a matrix product works on (N, rows, K).
    """
    layer, operator = judged.layer, judged.layer.operator
    if isinstance(operator, g.Gemm) and len(layer.shape) == 3:
        inputs = [x.reshape(len(x), -1, x.shape[-1]) for x in inputs]
        layer = replace(layer, shape=(math.prod(layer.shape[:-1]), layer.shape[-1]))
    elif isinstance(operator, g.Conv | g.MaxPool | g.AveragePool) and len(layer.shape) == 2:
        inputs = [x[:, :, None] for x in inputs]
        layer = replace(layer, shape=(layer.shape[0], 1, layer.shape[1]))
    return replace(judged, layer=layer), inputs


def litert(resolver: OpResolverType) -> Engine:
    """LiteRT with one of its sets of kernels."""

    def run(model: bytes, inputs: list[Int8Array]) -> list[Int8Array]:
        interpreter = Interpreter(model_content=model, experimental_op_resolver_type=resolver, num_threads=1)
        interpreter.allocate_tensors()
        for detail, array in zip(interpreter.get_input_details(), inputs, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]

    return run


def tflm(model: bytes, inputs: list[Int8Array]) -> list[Int8Array]:
    """TensorFlow Lite Micro."""
    from tflite_micro.python.tflite_micro import runtime

    interpreter = runtime.Interpreter.from_bytes(model, arena_size=1 << 26)
    for index, array in enumerate(inputs):
        interpreter.set_input(array, index)
    interpreter.invoke()
    outputs = schema.Model.GetRootAsModel(model, 0).Subgraphs(0).OutputsLength()
    return [interpreter.get_output(index) for index in range(outputs)]


def _order(layer: Layer, x: Int8Array) -> Int8Array:
    """Images with channels last; matrices as they are."""
    return np.ascontiguousarray(x) if isinstance(layer.operator, g.MatMul) else channels_last(x)


class _Author:
    """One layer on its way into a model; images have channels last."""

    def __init__(self, model: TfliteModel, judged: JudgedLayer, inputs: list[Int8Array]) -> None:
        self.model = model
        self.judged, self.layer, self.batch = judged, judged.layer, len(inputs[0])
        self.shapes = [_order(judged.layer, x).shape for x in inputs]
        self.inputs = [
            self.activation(shape, source)
            for shape, source in zip(self.shapes, self.layer.sources, strict=True)
        ]
        shape = (self.batch, *self.layer.shape)
        images = len(shape) == 4 and not isinstance(self.layer.operator, g.MatMul)
        shape = (shape[0], shape[2], shape[3], shape[1]) if images else shape
        self.shape = shape
        self.output = self.activation(shape, Quantization(self.layer.scale, self.layer.output.zero_point))

    def activation(self, shape: tuple[int, ...], q: Quantization) -> int:
        return self.model.tensor(shape, scale=q.scale, zero_point=q.zero_point)

    def integers(self, values: object) -> int:
        array = np.array(values, np.int32)
        return self.model.tensor(array.shape, np.int32, data=array)


def author(jobs: list[Job]) -> bytes:
    """Layers side by side in a .tflite model.

    Raises:
        Unjudged: TFLite has no such operator.
    """
    model, authors = TfliteModel(), []
    for judged, inputs in jobs:
        a, operator = _Author(model, judged, inputs), judged.layer.operator
        writer = _WRITERS.get(type(operator).__name__)
        if writer is None:
            raise Unjudged(f"no TFLite operator for {type(operator).__name__}")
        writer(a, operator)
        authors.append(a)
    return model.finish([x for a in authors for x in a.inputs], [a.output for a in authors])


def _activation(layer: Layer) -> int:
    """TFLite's fused activation that clamps as the layer does."""
    q = Quantization(layer.scale, layer.output.zero_point)
    bounds = {"NONE": (None, None), "RELU": (0.0, None), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
    roundings = ("half_away", "half_even")
    for rounding, (name, (low, high)) in itertools.product(roundings, bounds.items()):
        lowest = INT8_MIN if low is None else max(INT8_MIN, code_of(low, q, rounding))
        highest = INT8_MAX if high is None else min(INT8_MAX, code_of(high, q, rounding))
        if (lowest, highest) == (layer.output.low, layer.output.high):
            return int(getattr(schema.ActivationFunctionType, name))
    raise Unjudged(f"no TFLite activation clamps to [{layer.output.low}, {layer.output.high}]")


def _same(size: tuple[int, int], window: g.Window) -> tuple[int, int, int, int]:
    reach = [(k - 1) * d + 1 for k, d in zip(window.size, window.dilations, strict=True)]
    total = [
        max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, window.strides, reach, strict=True)
    ]
    return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2


def _padding(a: _Author, window: g.Window, shape: tuple[int, ...]) -> tuple[int, int]:
    """What the operator reads and its padding scheme; pads that TFLite lacks become a PAD before it."""
    if window.pads == (0, 0, 0, 0):
        return a.inputs[0], int(schema.Padding.VALID)
    if window.pads == _same((shape[1], shape[2]), window):
        return a.inputs[0], int(schema.Padding.SAME)
    top, left, bottom, right = window.pads
    padded = (shape[0], shape[1] + top + bottom, shape[2] + left + right, shape[3])
    between = a.activation(padded, a.layer.sources[0])
    pads = a.integers([[0, 0], [top, bottom], [left, right], [0, 0]])
    a.model.operator("PAD", [a.inputs[0], pads], [between], "PadOptions", 2)
    return between, int(schema.Padding.VALID)


def _conv(a: _Author, operator: g.Conv) -> None:
    weights, window = a.judged.prepared.weights, operator.window
    if len(a.shapes[0]) != 4:
        raise Unjudged("a convolution of single numbers")
    if operator.stuffing is not None:
        return _transposed_conv(a, operator)
    if operator.stuffing is not None:
        raise Unjudged("a transposed convolution")
    channels = a.shapes[0][3]
    depthwise = operator.groups == channels and channels > 1
    stored = weights.codes.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
    w = a.model.tensor(stored.shape, scale=weights.scales, axis=3 if depthwise else 0, data=stored)
    scales = weights.scales * a.layer.sources[0].scale
    b = a.model.tensor((len(weights.bias),), np.int32, scales, data=weights.bias)
    x, padding = _padding(a, window, a.shapes[0])
    fields = {
        "padding": padding,
        "strideH": window.strides[0],
        "strideW": window.strides[1],
        "dilationHFactor": window.dilations[0],
        "dilationWFactor": window.dilations[1],
        "fusedActivationFunction": _activation(a.layer),
    }
    if depthwise:
        fields["depthMultiplier"] = len(weights.codes) // channels
        a.model.operator("DEPTHWISE_CONV_2D", [x, w, b], [a.output], "DepthwiseConv2DOptions", 3, **fields)
    else:
        a.model.operator("CONV_2D", [x, w, b], [a.output], "Conv2DOptions", 3, **fields)


def _transposed_conv(a: _Author, operator: g.Conv) -> None:
    weights, (height, width) = a.judged.prepared.weights, operator.window.size
    whole = (height - 1, width - 1) * 2
    if operator.groups > 1 or operator.stuffing.pads != whole or operator.window.dilations != (1, 1):
        raise Unjudged("TFLite's transposed convolutions have no groups, no dilations, no odd pads")
    stored = weights.codes[..., ::-1, ::-1].transpose(0, 2, 3, 1)
    w = a.model.tensor(stored.shape, scale=weights.scales, data=stored)
    scales = weights.scales * a.layer.sources[0].scale
    b = a.model.tensor((len(weights.bias),), np.int32, scales, data=weights.bias)
    down, across = operator.stuffing.strides
    a.model.operator(
        "TRANSPOSE_CONV",
        [a.integers(a.shape), w, a.inputs[0], b],
        [a.output],
        "TransposeConvOptions",
        4 if _activation(a.layer) else 3,
        padding=schema.Padding.VALID,
        strideH=down,
        strideW=across,
        fusedActivationFunction=_activation(a.layer),
    )


def _matmul(a: _Author, operator: g.MatMul) -> None:
    if operator.factors:
        raise Unjudged("BATCH_MATMUL has no factor of its own")
    a.model.operator("BATCH_MATMUL", a.inputs, [a.output], "BatchMatMulOptions", 2)


def _gemm(a: _Author, operator: g.Gemm) -> None:
    if operator.axis != -1:
        raise Unjudged("FULLY_CONNECTED works on the last axis")
    weights = a.judged.prepared.weights
    w = a.model.tensor(weights.codes.shape, scale=weights.scales, data=weights.codes)
    scales = weights.scales * a.layer.sources[0].scale
    b = a.model.tensor((len(weights.bias),), np.int32, scales, data=weights.bias)
    fields = {"fusedActivationFunction": _activation(a.layer), "keepNumDims": len(a.shape) > 2}
    a.model.operator("FULLY_CONNECTED", [a.inputs[0], w, b], [a.output], "FullyConnectedOptions", 4, **fields)


def _pair(a: _Author, operator: g.Add | g.Sub | g.Mul) -> None:
    name = type(operator).__name__
    fused = _activation(a.layer)
    a.model.operator(name.upper(), a.inputs, [a.output], f"{name}Options", 2, fusedActivationFunction=fused)


def _in_one_scale(a: _Author) -> list[int]:
    """TFLite joins and compares tensors of one scale; QUANTIZE brings the operands there."""
    target, parts = Quantization(a.layer.scale, a.layer.output.zero_point), []
    for tensor, shape, source in zip(a.inputs, a.shapes, a.layer.sources, strict=True):
        if source != target:
            between = a.activation(shape, target)
            a.model.operator("QUANTIZE", [tensor], [between], "QuantizeOptions", 2)
            tensor = between
        parts.append(tensor)
    return parts


def _extreme(a: _Author, operator: g.Extreme) -> None:
    if len(a.inputs) != 2:
        raise Unjudged("TFLite compares two tensors")
    name = "MAXIMUM" if operator.largest else "MINIMUM"
    a.model.operator(name, _in_one_scale(a), [a.output], "MaximumMinimumOptions", 2)


def _concat(a: _Author, operator: g.Concat) -> None:
    axis = {1: 3, 2: 1, 3: 2}[operator.axis] if len(a.shape) == 4 else operator.axis
    a.model.operator("CONCATENATION", _in_one_scale(a), [a.output], "ConcatenationOptions", 2, axis=axis)


def _pool(a: _Author, operator: g.MaxPool | g.AveragePool) -> None:
    window = operator.window
    padded = window.pads != (0, 0, 0, 0)
    same = window.pads == _same(a.shapes[0][1:3], window)
    if (padded and not same) or window.dilations != (1, 1) or window.overhang != (0, 0):
        raise Unjudged("TFLite's pools pad as SAME or not at all")
    if padded and isinstance(operator, g.AveragePool) and operator.count_pads:
        raise Unjudged("TFLite's average pools do not count padding")
    name = "MAX_POOL_2D" if isinstance(operator, g.MaxPool) else "AVERAGE_POOL_2D"
    fields = {
        "filterHeight": window.size[0],
        "filterWidth": window.size[1],
        "strideH": window.strides[0],
        "strideW": window.strides[1],
        "padding": schema.Padding.SAME if same else schema.Padding.VALID,
    }
    a.model.operator(name, a.inputs, [a.output], "Pool2DOptions", 2, **fields)


def _mean(a: _Author, operator: g.Mean | g.Sum) -> None:
    if operator.axes != (2, 3):
        raise Unjudged("a mean or a sum over other axes than height and width")
    axes, name = a.integers([1, 2]), "SUM" if isinstance(operator, g.Sum) else "MEAN"
    a.model.operator(name, [a.inputs[0], axes], [a.output], "ReducerOptions", 2, keepDims=len(a.shape) == 4)


def _pads_of_images(pads: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """With channels last."""
    return [*pads[1:], pads[0]] if len(pads) == 3 else list(pads)


def _pad(a: _Author, operator: g.Pad) -> None:
    pads = a.integers([(0, 0), *_pads_of_images(operator.pads)])
    a.model.operator("PAD", [a.inputs[0], pads], [a.output], "PadOptions", 2)


def _interpolate(a: _Author, operator: g.Interpolate) -> None:
    half = any(taps.weight[0] != 0 for taps in (operator.rows, operator.columns))
    size = a.integers(a.shape[1:3])
    a.model.operator(
        "RESIZE_BILINEAR", [a.inputs[0], size], [a.output], "ResizeBilinearOptions", 3, halfPixelCenters=half
    )


def _select(a: _Author, operator: g.Select) -> None:
    if operator.op != "Resize" or len(a.shape) != 4:
        raise Unjudged(f"{operator.op} moves data only")
    names = [a.inputs[0], a.integers(a.shape[1:3])]
    a.model.operator("RESIZE_NEAREST_NEIGHBOR", names, [a.output], "ResizeNearestNeighborOptions", 3)


def _clamp(a: _Author, operator: g.Clamp) -> None:
    kinds = schema.ActivationFunctionType
    names = {kinds.RELU: "RELU", kinds.RELU6: "RELU6", kinds.RELU_N1_TO_1: "RELU_N1_TO_1"}
    name = names.get(_activation(a.layer))
    if name is None:
        raise Unjudged("a clamp that bounds nothing")
    a.model.operator(name, a.inputs, [a.output], "", 1 if name == "RELU_N1_TO_1" else 2)


def _function(a: _Author, operator: g.Lut) -> None:
    names = {"Sigmoid": ("LOGISTIC", 2), "Tanh": ("TANH", 2), "HardSwish": ("HARD_SWISH", 1)}
    function = operator.steps[0].operator
    if len(operator.steps) == 1 and getattr(function, "name", "") == "LeakyRelu":
        a.model.operator("LEAKY_RELU", a.inputs, [a.output], "LeakyReluOptions", 2, alpha=function.alpha)
        return
    known = names.get(getattr(function, "name", "")) if len(operator.steps) == 1 else None
    if known is None:
        raise Unjudged("no TFLite operator for this function")
    a.model.operator(known[0], a.inputs, [a.output], "", known[1])


_WRITERS: dict[str, Callable[[_Author, g.Operator], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _pair,
    "Sub": _pair,
    "Mul": _pair,
    "Concat": _concat,
    "Extreme": _extreme,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Mean": _mean,
    "Sum": _mean,
    "Pad": _pad,
    "Interpolate": _interpolate,
    "Select": _select,
    "Clamp": _clamp,
    "Lut": _function,
}

JUDGES = (
    TfliteJudge("TFLM", tflm, bounded_relu_rescales=False),
    TfliteJudge("LiteRT reference", litert(OpResolverType.BUILTIN_REF)),
    TfliteJudge("LiteRT ruy", litert(OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)),
    TfliteJudge("LiteRT XNNPACK", litert(OpResolverType.BUILTIN)),
)
