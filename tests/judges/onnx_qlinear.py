"""ONNX Runtime as judge: the layer is authored as its integer operators (QLinearConv, ...)."""

from collections.abc import Callable

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from npu_server.compile import graph as g
from npu_server.compile.planning.lowering import Layer
from npu_server.numerics.scales import Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

from .layers import Job, JudgedLayer, Unjudged, constants_as_activations

_MICROSOFT = "com.microsoft"


class _Author:
    """One layer on its way into a model; every name has the layer's prefix, the last node's result is y."""

    def __init__(self, judged: JudgedLayer, prefix: str) -> None:
        self.judged, self.layer = judged, judged.layer
        self.nodes: list = []
        self.constants: dict[str, np.ndarray] = {}
        self.prefix = prefix
        self.inputs = [f"x{i}" for i in range(len(judged.layer.sources))]
        for name, source in zip(self.inputs, judged.layer.sources, strict=True):
            self.quantization(name, source)
        self.quantization("y", Quantization(self.layer.scale, self.layer.output.zero_point))

    def quantization(self, name: str, q: Quantization) -> None:
        self.constants[f"s_{name}"] = np.array(q.scale, np.float32)
        self.constants[f"z_{name}"] = np.array(q.zero_point, np.int8)

    def triple(self, name: str) -> list[str]:
        """A tensor with its scale and zero point."""
        return [name, f"s_{name}", f"z_{name}"]

    def node(self, op: str, inputs: list[str], domain: str = "", **attributes: object) -> None:
        self.nodes.append(helper.make_node(op, inputs, ["y"], domain=domain, **attributes))

    def weights(self) -> None:
        weights = self.judged.prepared.weights
        self.constants |= {
            "w": weights.codes,
            "s_w": weights.scales.astype(np.float32),
            "z_w": np.zeros(len(weights.codes), np.int8),
            "b": weights.bias.astype(np.int32),
        }

    def clamp(self) -> None:
        """The layer's activation, on codes."""
        low, high = self.layer.output.low, self.layer.output.high
        if (low, high) != (INT8_MIN, INT8_MAX):
            self.nodes[-1].output[0] = "before"
            self.constants |= {"low": np.array(low, np.int8), "high": np.array(high, np.int8)}
            self.nodes.append(helper.make_node("Clip", ["before", "low", "high"], ["y"]))

    def finish(self) -> None:
        """Puts the prefix before all names."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name and self.prefix + name for name in names]


class OnnxRuntimeJudge:
    """ONNX Runtime's CPU kernels."""

    name = "ONNX Runtime"

    def run(self, judged: JudgedLayer, inputs: list[Int8Array]) -> Int8Array:
        """The layer's output by the engine, logical order; see `Judge.run`."""
        return self.run_all([(judged, inputs)])[0]

    def run_all(self, jobs: list[Job]) -> list[Int8Array]:
        """The outputs of several layers that stand side by side in one graph; see `Judge.run_all`."""
        authors, feeds = [], {}
        for index, (judged, inputs) in enumerate(constants_as_activations(*job) for job in jobs):
            author = _Author(judged, f"layer{index}_")
            writer = _WRITERS.get(type(judged.layer.operator).__name__)
            if writer is None:
                raise Unjudged(f"no integer ONNX operator for {type(judged.layer.operator).__name__}")
            writer(author, judged.layer.operator)
            author.clamp()
            author.finish()
            authors.append(author)
            for name, x in zip(author.inputs, inputs, strict=True):
                feeds[author.prefix + name] = _flat(judged.layer, x)
        results = _run(authors, feeds)
        return [
            result.reshape(len(inputs[0]), *judged.layer.shape)
            for (judged, inputs), result in zip(jobs, results, strict=True)
        ]


def _flat(layer: Layer, x: Int8Array) -> Int8Array:
    return x.reshape(-1, x.shape[-1]) if isinstance(layer.operator, g.Gemm) else np.ascontiguousarray(x)


def _run(authors: list[_Author], feeds: dict[str, Int8Array]) -> list[Int8Array]:
    graph = helper.make_graph(
        [node for a in authors for node in a.nodes],
        "judge",
        [helper.make_tensor_value_info(n, TensorProto.INT8, x.shape) for n, x in feeds.items()],
        [helper.make_tensor_value_info(f"{a.prefix}y", TensorProto.INT8, None) for a in authors],
        [
            numpy_helper.from_array(array, a.prefix + name)
            for a in authors
            for name, array in a.constants.items()
        ],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(_MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def _conv(a: _Author, operator: g.Conv) -> None:
    if operator.stuffing is not None:
        raise Unjudged("ONNX Runtime has no integer transposed convolution")
    a.weights()
    window = operator.window
    fields = {"pads": window.pads, "strides": window.strides, "dilations": window.dilations}
    names = [*a.triple("x0"), *a.triple("w"), "s_y", "z_y", "b"]
    a.node("QLinearConv", names, **fields, group=operator.groups)


def _gemm(a: _Author, operator: g.Gemm) -> None:
    if operator.axis != -1:
        raise Unjudged("QGemm works on the last axis")
    a.weights()
    a.node("QGemm", [*a.triple("x0"), *a.triple("w"), "b", "s_y", "z_y"], _MICROSOFT, transB=1)


def _matmul(a: _Author, operator: g.MatMul) -> None:
    if operator.factors:
        raise Unjudged("QLinearMatMul has no factor of its own")
    a.node("QLinearMatMul", [*a.triple("x0"), *a.triple("x1"), "s_y", "z_y"])


def _pair(a: _Author, operator: g.Add | g.Mul) -> None:
    names = [*a.triple("x0"), *a.triple("x1"), "s_y", "z_y"]
    a.node(f"QLinear{type(operator).__name__}", names, _MICROSOFT)


def _concat(a: _Author, operator: g.Concat) -> None:
    names = [name for x in a.inputs for name in a.triple(x)]
    a.node("QLinearConcat", ["s_y", "z_y", *names], _MICROSOFT, axis=operator.axis)


def _pool_fields(window: g.Window) -> dict[str, object]:
    fields = {"kernel_shape": window.size, "pads": window.pads, "strides": window.strides}
    return fields | {"ceil_mode": int(window.overhang != (0, 0))}


def _average_pool(a: _Author, operator: g.AveragePool) -> None:
    window = operator.window
    if window.dilations != (1, 1):
        raise Unjudged("QLinearAveragePool has no dilations")
    fields = _pool_fields(window)
    counts = int(operator.count_pads)
    names = [*a.triple("x0"), "s_y", "z_y"]
    a.node("QLinearAveragePool", names, _MICROSOFT, **fields, count_include_pad=counts, channels_last=0)


def _max_pool(a: _Author, operator: g.MaxPool) -> None:
    window = operator.window
    fields = _pool_fields(window)
    a.node("MaxPool", ["x0"], **fields, dilations=window.dilations)


def _mean(a: _Author, operator: g.Mean) -> None:
    a.node("QLinearGlobalAveragePool", [*a.triple("x0"), "s_y", "z_y"], _MICROSOFT, channels_last=0)


def _pad(a: _Author, operator: g.Pad) -> None:
    before, after = zip((0, 0), *operator.pads, strict=True)
    a.constants["pads"] = np.array([*before, *after])
    a.node("Pad", ["x0", "pads", "z_y"])


def _function(a: _Author, operator: g.Lut) -> None:
    function = getattr(operator.steps[0].operator, "name", "")
    if len(operator.steps) == 1 and function == "LeakyRelu":
        alpha = operator.steps[0].operator.alpha
        a.node("QLinearLeakyRelu", [*a.triple("x0"), "s_y", "z_y"], _MICROSOFT, alpha=alpha)
        return
    if len(operator.steps) != 1 or function != "Sigmoid":
        raise Unjudged("ONNX Runtime has no integer operator for this function")
    a.node("QLinearSigmoid", [*a.triple("x0"), "s_y", "z_y"], _MICROSOFT)


_WRITERS: dict[str, Callable[[_Author, g.Operator], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _pair,
    "Mul": _pair,
    "Concat": _concat,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Pad": _pad,
    "Lut": _function,
}

JUDGES = (OnnxRuntimeJudge(),)
