"""A quantized network as one .tflite model, run by TensorFlow Lite Micro from end to end."""

import math
from collections.abc import Callable

import numpy as np
from tflite_micro.python.tflite_micro import runtime

from tests.judges.tflite_models import TfliteModel, schema

from .formulas import LOWEST, Quantization, same_pads
from .quantizer import QuantizedNetwork, Step

_ACTIVATIONS = {
    (-math.inf, math.inf): "NONE",
    (0.0, math.inf): "RELU",
    (0.0, 6.0): "RELU6",
    (-1.0, 1.0): "RELU_N1_TO_1",
}


class _Author:
    """The model as it grows; images have channels last."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self.network, self.model = network, TfliteModel()
        self.shapes = {network.input: network.input_shape} | {s.name: s.shape for s in network.steps}
        self.scales = {network.input: network.x} | {s.name: s.y for s in network.steps}
        self.tensors = {
            name: self.activation(_last(shape), self.scales[name]) for name, shape in self.shapes.items()
        }
        self.bytes = sum(math.prod(shape) for shape in self.shapes.values())

    def activation(self, shape: tuple[int, ...], q: Quantization) -> int:
        return self.model.tensor(shape, scale=q.scale, zero_point=q.zero_point)

    def integers(self, values: object) -> int:
        array = np.array(values, np.int32)
        return self.model.tensor(array.shape, np.int32, data=array)

    def ports(self, step: Step) -> tuple[list[int], int]:
        """The tensors that a layer reads, and the one that it writes."""
        return [self.tensors[name] for name in step.inputs], self.tensors[step.name]

    def operator(self, name: str, inputs: list[int], output: int, options: str, version: int, **fields):
        self.model.operator(name, inputs, [output], options, version, **fields)


def run(network: QuantizedNetwork, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor of the network by value name, each computed from the engine's own ones before.

    Raises:
        NotImplementedError: TFLite has no operator that says it.
    """
    author = _Author(network)
    for step in network.steps:
        _WRITERS[step.op](author, step)
    model = author.model.finish([author.tensors[network.input]], [author.tensors[network.output]])
    interpreter = runtime.Interpreter.from_bytes(
        model,
        arena_size=8 * author.bytes + 4 * len(model) + (1 << 22),
        intrepreter_config=runtime.InterpreterConfig.kPreserveAllTensors,
    )
    interpreter.set_input(np.ascontiguousarray(codes.transpose(0, 2, 3, 1)), 0)
    interpreter.invoke()
    tensors = {}
    for step in network.steps:
        tensor = interpreter.GetTensor(author.tensors[step.name], 0)["tensor_data"]
        tensors[step.name] = tensor.transpose(0, 3, 1, 2) if len(step.shape) == 4 else tensor
    return tensors


def _last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with the channels last."""
    return (shape[0], shape[2], shape[3], shape[1]) if len(shape) == 4 else shape


def _activation(step: Step) -> int:
    name = _ACTIVATIONS.get(step.bounds)
    if name is None:
        raise NotImplementedError(f"no TFLite activation between {step.bounds}")
    return int(getattr(schema.ActivationFunctionType, name))


def _padded(a: _Author, step: Step, kernel: list[int], fill: int | None) -> tuple[int, int]:
    """What a window slides over and the scheme; pads that TFLite lacks become an operator before it.

    Args:
        a: the model.
        step: the layer.
        kernel: height and width of its window.
        fill: code in the padding; None for the input's zero point.
    """
    x, shape = a.tensors[step.inputs[0]], a.shapes[step.inputs[0]]
    kind = step.fields.get("auto_pad", b"NOTSET").decode()
    pads = list(step.fields.get("pads", [0] * 4))
    if kind == "SAME_UPPER":
        return x, int(schema.Padding.SAME)
    if kind == "SAME_LOWER":
        strides, dilations = (list(step.fields.get(key, [1, 1])) for key in ("strides", "dilations"))
        pads = same_pads(shape[2:], kernel, strides, dilations, upper=False)
    if not any(pads):
        return x, int(schema.Padding.VALID)
    top, left, bottom, right = pads
    n, channels, height, width = shape
    q = a.scales[step.inputs[0]]
    between = a.activation((n, height + top + bottom, width + left + right, channels), q)
    a.bytes += n * channels * (height + top + bottom) * (width + left + right)
    names = [x, a.integers([[0, 0], [top, bottom], [left, right], [0, 0]])]
    if fill is None:
        a.operator("PAD", names, between, "PadOptions", 2)
    else:
        code = a.model.tensor((1,), np.int8, q.scale, q.zero_point, data=np.array([fill], np.int8))
        a.operator("PADV2", [*names, code], between, "PadV2Options", 2)
    return between, int(schema.Padding.VALID)


def _parameters(a: _Author, step: Step, stored: np.ndarray, axis: int) -> list[int]:
    """Weight and bias; one scale for all channels is written once."""
    weights = step.weights
    assert weights is not None
    scales = weights.scales if len(set(weights.scales)) > 1 else weights.scales[:1]
    weight = a.model.tensor(stored.shape, np.int8, scales, axis=axis, data=stored)
    products = scales * a.scales[step.inputs[0]].scale
    return [weight, a.model.tensor((len(weights.bias),), np.int32, products, data=weights.bias)]


def _conv(a: _Author, step: Step) -> None:
    weights, (inputs, y) = step.weights, a.ports(step)
    assert weights is not None
    shape, groups = a.shapes[step.inputs[0]], step.fields.get("group", 1)
    if len(shape) == 2:  # one number a channel
        pixel, result = (
            a.activation((shape[0], 1, 1, shape[1]), q) for q in (a.scales[step.inputs[0]], step.y)
        )
        a.operator("RESHAPE", [*inputs, a.integers([shape[0], 1, 1, shape[1]])], pixel, "ReshapeOptions", 1)
        x, padding, target = pixel, int(schema.Padding.VALID), result
    else:
        x, padding = _padded(a, step, list(weights.codes.shape[2:]), None)
        target = y
    strides, dilations = (step.fields.get(key, [1, 1]) for key in ("strides", "dilations"))
    fields = {
        "padding": padding,
        "strideH": strides[0],
        "strideW": strides[1],
        "dilationHFactor": dilations[0],
        "dilationWFactor": dilations[1],
        "fusedActivationFunction": _activation(step),
    }
    if groups == shape[1] and groups > 1:
        names = [x, *_parameters(a, step, weights.codes.transpose(1, 2, 3, 0), 3)]
        fields["depthMultiplier"] = len(weights.codes) // groups
        a.operator("DEPTHWISE_CONV_2D", names, target, "DepthwiseConv2DOptions", 3, **fields)
    else:
        names = [x, *_parameters(a, step, weights.codes.transpose(0, 2, 3, 1), 0)]
        a.operator("CONV_2D", names, target, "Conv2DOptions", 3, **fields)
    if target != y:
        a.operator("RESHAPE", [target, a.integers(step.shape)], y, "ReshapeOptions", 1)


def _transposed_conv(a: _Author, step: Step) -> None:
    """The whole of it; pads cut off what the engine computed."""
    weights, (inputs, y) = step.weights, a.ports(step)
    assert weights is not None
    n, out, height, width = step.shape
    top, left, bottom, right = step.fields.get("pads", [0] * 4)
    if step.fields.get("group", 1) > 1 or list(step.fields.get("dilations", [1, 1])) != [1, 1]:
        raise NotImplementedError("a transposed convolution with groups or dilations")
    whole = (n, height + top + bottom, width + left + right, out)
    between = a.activation(whole, step.y)
    a.bytes += math.prod(whole)
    stored = weights.codes[..., ::-1, ::-1].transpose(0, 2, 3, 1)
    weight, bias = _parameters(a, step, stored, 0)
    strides = step.fields.get("strides", [1, 1])
    fields = {"padding": schema.Padding.VALID, "strideH": strides[0], "strideW": strides[1]}
    names = [a.integers(whole), weight, *inputs, bias]
    fused, version = _activation(step), 4 if _activation(step) else 3
    fields["fusedActivationFunction"] = fused
    a.operator("TRANSPOSE_CONV", names, between, "TransposeConvOptions", version, **fields)
    begin, end = a.integers([0, top, left, 0]), a.integers([n, top + height, left + width, out])
    a.operator("STRIDED_SLICE", [between, begin, end, a.integers([1] * 4)], y, "StridedSliceOptions", 2)


def _gemm(a: _Author, step: Step) -> None:
    (inputs, y), weights = a.ports(step), step.weights
    assert weights is not None
    names = [*inputs, *_parameters(a, step, weights.codes, 0)]
    fused = _activation(step)
    a.operator("FULLY_CONNECTED", names, y, "FullyConnectedOptions", 4, fusedActivationFunction=fused)


def _pair(a: _Author, step: Step) -> None:
    inputs, y = a.ports(step)
    fused = _activation(step)
    a.operator(step.op.upper(), inputs, y, f"{step.op}Options", 2, fusedActivationFunction=fused)


def _concat(a: _Author, step: Step) -> None:
    """TFLite joins tensors of one scale; QUANTIZE brings the operands there."""
    inputs, y = a.ports(step)
    parts = []
    for name, tensor in zip(step.inputs, inputs, strict=True):
        if a.scales[name] != step.y:
            between = a.activation(_last(a.shapes[name]), step.y)
            a.bytes += math.prod(a.shapes[name])
            a.operator("QUANTIZE", [tensor], between, "QuantizeOptions", 2)
            tensor = between
        parts.append(tensor)
    axis = {0: 0, 1: 3, 2: 1, 3: 2}[step.fields["axis"]] if len(step.shape) == 4 else step.fields["axis"]
    a.operator("CONCATENATION", parts, y, "ConcatenationOptions", 2, axis=axis)


def _pool(a: _Author, step: Step) -> None:
    _, y = a.ports(step)
    kernel = list(step.fields["kernel_shape"])
    largest = step.op == "MaxPool"
    x, padding = _padded(a, step, kernel, LOWEST if largest else None)
    if x != a.tensors[step.inputs[0]] and not largest and not step.fields.get("count_include_pad", 0):
        raise NotImplementedError("an average that leaves out padding of its own")
    strides = step.fields.get("strides", [1, 1])
    fields = {"filterHeight": kernel[0], "filterWidth": kernel[1], "padding": padding}
    fields |= {"strideH": strides[0], "strideW": strides[1]}
    name = "MAX_POOL_2D" if largest else "AVERAGE_POOL_2D"
    a.operator(name, [x], y, "Pool2DOptions", 2, **fields)


def _mean(a: _Author, step: Step) -> None:
    inputs, y = a.ports(step)
    keep = len(step.shape) == 4
    a.operator("MEAN", [*inputs, a.integers([1, 2])], y, "ReducerOptions", 2, keepDims=keep)


def _pad(a: _Author, step: Step) -> None:
    (inputs, y), half = a.ports(step), len(step.pads) // 2
    pairs = [(step.pads[axis], step.pads[half + axis]) for axis in (0, 2, 3, 1)]
    a.operator("PAD", [*inputs, a.integers(pairs)], y, "PadOptions", 2)


def _reshape(a: _Author, step: Step) -> None:
    """An image of more than a pixel is brought into ONNX's order first."""
    (x, *_), y = a.ports(step)
    shape = a.shapes[step.inputs[0]]
    if len(step.shape) == 4 and math.prod(step.shape[2:]) > 1:
        raise NotImplementedError("a reshape to an image")
    if len(shape) == 4 and math.prod(shape[2:]) > 1:
        between = a.activation(shape, step.y)
        a.bytes += math.prod(shape)
        a.operator("TRANSPOSE", [x, a.integers([0, 3, 1, 2])], between, "TransposeOptions", 2)
        x = between
    a.operator("RESHAPE", [x, a.integers(_last(step.shape))], y, "ReshapeOptions", 1)


def _clamp(a: _Author, step: Step) -> None:
    inputs, y = a.ports(step)
    if step.bounds != (0.0, math.inf):
        raise NotImplementedError(f"no lone TFLite activation between {step.bounds}")
    a.operator("RELU", inputs, y, "", 2)


_WRITERS: dict[str, Callable[[_Author, Step], None]] = {
    "Conv": _conv,
    "ConvTranspose": _transposed_conv,
    "Gemm": _gemm,
    "Add": _pair,
    "Sub": _pair,
    "Mul": _pair,
    "Concat": _concat,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Mean": _mean,
    "Pad": _pad,
    "Reshape": _reshape,
    "Clamp": _clamp,
}
