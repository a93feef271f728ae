"""A quantized network as one ONNX graph of integer operators, run by ONNX Runtime from end to end."""

from collections.abc import Callable

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .formulas import HIGHEST, LOWEST, Quantization, same_pads
from .quantizer import QuantizedNetwork, Step
from .reading import plain_session

_MICROSOFT = "com.microsoft"
_WINDOW = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")


class _Author:
    """The graph as it grows; tensors keep their value names."""

    def __init__(self, network: QuantizedNetwork) -> None:
        self.network = network
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self.shapes = {network.input: network.input_shape} | {s.name: s.shape for s in network.steps}
        self.declare(network.input, network.x)
        for step in network.steps:
            self.declare(step.name, step.y)

    def declare(self, name: str, q: Quantization) -> None:
        self.constants[f"{name}/scale"] = np.array(q.scale, np.float32)
        self.constants[f"{name}/zero_point"] = np.array(q.zero_point, np.int8)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def triple(self, name: str) -> list[str]:
        """A tensor with its scale and zero point."""
        return [name, f"{name}/scale", f"{name}/zero_point"]

    def node(self, op: str, inputs: list[str], output: str, domain: str = "", **fields: object) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **fields))


def run(network: QuantizedNetwork, codes: np.ndarray) -> dict[str, np.ndarray]:
    """Every tensor of the network by value name, each computed from the engine's own ones before."""
    author = _Author(network)
    for step in network.steps:
        clamped = step.weights is not None or step.op in ("Add", "Mul")
        clamped = clamped and (step.low, step.high) != (LOWEST, HIGHEST)
        result = f"{step.name}/unclamped" if clamped else step.name
        _WRITERS[step.op](author, step, result)
        if clamped:
            bounds = [
                author.constant(f"{step.name}/{end}", np.array(code, np.int8))
                for end, code in (("low", step.low), ("high", step.high))
            ]
            author.node("Clip", [result, *bounds], step.name)
    names = [step.name for step in network.steps]
    graph = helper.make_graph(
        author.nodes,
        "network",
        [helper.make_tensor_value_info(network.input, TensorProto.INT8, codes.shape)],
        [helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in names],
        [numpy_helper.from_array(array, name) for name, array in author.constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    results = plain_session(model.SerializeToString()).run(None, {network.input: codes})
    return dict(zip(names, results, strict=True))


def _weights(a: _Author, step: Step) -> tuple[list[str], str]:
    """Weight with scale and zero point, and the bias."""
    weights = step.weights
    assert weights is not None
    zeros = np.zeros(len(weights.codes), np.int8)
    names = [
        a.constant(f"{step.name}/w", weights.codes),
        a.constant(f"{step.name}/w/scale", weights.scales),
        a.constant(f"{step.name}/w/zero_point", zeros),
    ]
    return names, a.constant(f"{step.name}/b", weights.bias.astype(np.int32))


def _conv(a: _Author, step: Step, result: str) -> None:
    weight, bias = _weights(a, step)
    fields = {key: step.fields[key] for key in (*_WINDOW, "group") if key in step.fields}
    x, shape = a.triple(step.inputs[0]), a.shapes[step.inputs[0]]
    if len(shape) == 2:  # one number a channel
        image = f"{step.name}/image"
        a.node("Reshape", [x[0], a.constant(f"{image}/shape", np.array([*shape, 1, 1]))], image)
        inner = f"{step.name}/pixel"
        a.node("QLinearConv", [image, *x[1:], *weight, *a.triple(step.name)[1:], bias], inner, **fields)
        a.node("Reshape", [inner, a.constant(f"{inner}/shape", np.array(step.shape))], result)
        return
    a.node("QLinearConv", [*x, *weight, *a.triple(step.name)[1:], bias], result, **fields)


def _gemm(a: _Author, step: Step, result: str) -> None:
    weight, bias = _weights(a, step)
    names = [*a.triple(step.inputs[0]), *weight, bias, *a.triple(step.name)[1:]]
    a.node("QGemm", names, result, _MICROSOFT, transB=1)


def _pair(a: _Author, step: Step, result: str) -> None:
    names = [name for x in step.inputs for name in a.triple(x)]
    a.node(f"QLinear{step.op}", [*names, *a.triple(step.name)[1:]], result, _MICROSOFT)


def _concat(a: _Author, step: Step, result: str) -> None:
    names = [name for x in step.inputs for name in a.triple(x)]
    a.node("QLinearConcat", [*a.triple(step.name)[1:], *names], result, _MICROSOFT, **step.fields)


def _max_pool(a: _Author, step: Step, result: str) -> None:
    fields = {key: step.fields[key] for key in _WINDOW if key in step.fields}
    a.node("MaxPool", [step.inputs[0]], result, **fields)


def _average_pool(a: _Author, step: Step, result: str) -> None:
    fields = {key: step.fields[key] for key in _WINDOW if key in step.fields}
    kind = fields.pop("auto_pad", b"NOTSET").decode()
    if kind.startswith("SAME"):  # the engine refuses auto_pad here
        kernel = list(fields["kernel_shape"])
        size = a.shapes[step.inputs[0]][2:]
        strides = list(fields.get("strides", [1, 1]))
        fields["pads"] = same_pads(size, kernel, strides, [1, 1], kind == "SAME_UPPER")
    names = [*a.triple(step.inputs[0]), *a.triple(step.name)[1:]]
    a.node("QLinearAveragePool", names, result, _MICROSOFT, channels_last=0, **fields)


def _mean(a: _Author, step: Step, result: str) -> None:
    names = [*a.triple(step.inputs[0]), *a.triple(step.name)[1:]]
    pooled = result if len(step.shape) == 4 else f"{step.name}/pooled"
    a.node("QLinearGlobalAveragePool", names, pooled, _MICROSOFT, channels_last=0)
    if pooled != result:
        a.node("Reshape", [pooled, a.constant(f"{pooled}/shape", np.array(step.shape))], result)


def _pad(a: _Author, step: Step, result: str) -> None:
    pads = a.constant(f"{step.name}/pads", np.array(step.pads))
    a.node("Pad", [step.inputs[0], pads, f"{step.name}/zero_point"], result)


def _reshape(a: _Author, step: Step, result: str) -> None:
    a.node("Reshape", [step.inputs[0], a.constant(f"{step.name}/shape", np.array(step.shape))], result)


def _transpose(a: _Author, step: Step, result: str) -> None:
    a.node("Transpose", [step.inputs[0]], result, **step.fields)


def _clamp(a: _Author, step: Step, result: str) -> None:
    """No integer operator of the engine: a table of the page's rule, the engine looks codes up in it."""
    x = a.network.quantization(step.inputs[0])
    codes = np.arange(LOWEST, HIGHEST + 1)
    if x == step.y:
        table = codes
    else:
        table = np.round((codes - x.zero_point).astype(np.float32) * (x.scale / step.y.scale))
        table = table + step.y.zero_point
    table = np.clip(table, step.low, step.high).astype(np.int8)
    index, wide = f"{step.name}/index", f"{step.name}/wide"
    a.node("Cast", [step.inputs[0]], wide, to=TensorProto.INT32)
    a.node("Add", [wide, a.constant(f"{step.name}/128", np.array(128, np.int32))], index)
    a.node("Gather", [a.constant(f"{step.name}/table", table), index], result)


_WRITERS: dict[str, Callable[[_Author, Step, str], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "Add": _pair,
    "Mul": _pair,
    "Concat": _concat,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Mean": _mean,
    "Pad": _pad,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Clamp": _clamp,
}
