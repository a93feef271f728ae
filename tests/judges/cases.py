"""Random layers of every operator: shapes, windows, scales (powers of two too: ties), extremes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from npu_server.numerics.profile import Profile
from npu_wire.layer_map import Int8Array

from .layers import JudgedLayer, compile_layers

Rng = np.random.Generator


@dataclass(frozen=True)
class Scale:
    """A scale and a zero point that a range is made for."""

    scale: float
    zero_point: int

    @property
    def range(self) -> tuple[float, float]:
        """The range that an affine profile turns into just these."""
        scale = float(np.float32(self.scale))
        return (-128 - self.zero_point) * scale, (127 - self.zero_point) * scale


@dataclass(frozen=True)
class Case:
    """A float model whose last layer is judged, and the codes it is judged on."""

    model: bytes
    ranges: dict[str, tuple[float, float]]
    batch: int
    extreme: bool
    seed: int

    def compile(self, profile: Profile) -> JudgedLayer:
        """The judged layer."""
        return compile_layers(self.model, self.ranges, profile)[-1]

    def inputs(self, judged: JudgedLayer) -> list[Int8Array]:
        """Any code is as likely as any other; of an extreme case: -128 and 127 only."""
        rng = np.random.default_rng(self.seed)
        codes = np.array([-128, 127]) if self.extreme else np.arange(-128, 128)
        return [rng.choice(codes, (self.batch, *shape)).astype(np.int8) for shape in judged.input_shapes]


class _Draw:
    """Draws one case."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.powers = bool(self.rng.random() < 0.4)
        self.extreme = bool(self.rng.random() < 0.15)

    def scale(self, low: float = 0.01, high: float = 0.2) -> Scale:
        zero_point = int(self.rng.choice([-128, -1, 0, 3, int(self.rng.integers(-128, 128))]))
        if self.powers:
            exponent = self.rng.integers(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
            return Scale(2.0**exponent, zero_point)
        return Scale(float(np.exp(self.rng.uniform(np.log(low), np.log(high)))), zero_point)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def case(self, nodes, shape, scales, initializers=None, batch: int = 2) -> Case:
        arrays = [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()]
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "others"])],
            arrays,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        ranges = {name: scale.range for name, scale in scales.items()}
        return Case(model.SerializeToString(), ranges, batch, self.extreme, self.seed)

    def weights(self, out: int, *inner: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight, bias, and the scale of each output channel; -127 and 127 are among the codes."""
        codes = self.rng.integers(-127, 128, (out, *inner))
        codes.reshape(out, -1)[:, 0] = 127
        column = (out, *[1] * len(inner))
        steps = (
            2.0 ** -self.rng.integers(5, 9, column) if self.powers else self.rng.uniform(0.002, 0.03, column)
        )
        return (codes * steps).astype(np.float32), self.rng.normal(0, 3, out).astype(np.float32), steps

    def sum_scale(self, x: Scale, steps: np.ndarray, terms: int) -> Scale:
        """A scale in which sums fill the codes, some of them beyond."""
        spread = x.scale * float(steps.max()) * 73 * 74 * np.sqrt(terms) / 50
        spread *= float(self.rng.choice([0.5, 1, 2]))
        spread = 2.0 ** np.round(np.log2(spread)) if self.powers else spread
        return Scale(spread, self.scale().zero_point)


def _activated(draw: _Draw, node: str) -> tuple[list, str]:
    """Perhaps an activation behind a node's output; nodes and the name of that output."""
    kind = str(draw.rng.choice(["", "Relu", "Clip"]))
    if kind == "Relu":
        return [helper.make_node("Relu", ["c"], ["y"], "act")], "c"
    if kind == "Clip":
        return [helper.make_node("Clip", ["c", "zero", "six"], ["y"], "act")], "c"
    return [], "y"


_BOUNDS = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}


def _convolution(draw: _Draw, kind: str) -> Case:
    groups, kernel, strides, dilations = 1, [3, 3], [1, 1], [1, 1]
    channels, out = draw.integer(1, 24), draw.integer(1, 32)
    if kind == "plain":
        kernel = [draw.integer(1, 5), draw.integer(1, 5)]
        strides = [draw.integer(1, 2)] * 2
    elif kind == "pointwise":
        kernel, channels, out = [1, 1], draw.integer(8, 128), draw.integer(8, 64)
        strides = [draw.integer(1, 2)] * 2
    elif kind == "dilated":
        dilations = [draw.integer(1, 3), draw.integer(2, 3)]
    elif kind == "depthwise":
        channels = groups = draw.integer(2, 32)
        out, strides = channels * draw.integer(1, 3), [draw.integer(1, 2)] * 2
    elif kind == "grouped":
        groups = draw.integer(2, 4)
        channels, out = groups * draw.integer(2, 8), groups * draw.integer(1, 8)
    attributes = {"strides": strides, "dilations": dilations, "group": groups, "kernel_shape": kernel}
    padding = draw.integer(0, 2)
    if padding == 0:
        attributes["auto_pad"] = "SAME_UPPER"
    elif padding == 1:
        attributes["pads"] = [draw.integer(0, k - 1) for k in kernel * 2]
    weight, bias, steps = draw.weights(out, channels // groups, *kernel)
    x = draw.scale()
    y = draw.sum_scale(x, steps, int(np.prod(weight.shape[1:])))
    if draw.rng.random() < 0.1:
        # The bias nearly fills 32 bits; the output's scale follows it.
        bias = (draw.rng.uniform(-(2.0**30), 2.0**30, out) * steps.reshape(-1) * x.scale).astype(np.float32)
        y = Scale(y.scale * 2.0**14, y.zero_point)
    nodes, name = _activated(draw, "conv")
    nodes.insert(0, helper.make_node("Conv", ["x", "w", "b"], [name], "conv", **attributes))
    size = (channels, draw.integer(9, 16), draw.integer(9, 16))
    return draw.case(nodes, size, {"x": x, "y": y, "c": y}, {"w": weight, "b": bias} | _BOUNDS)


def _transposed_convolution(draw: _Draw) -> Case:
    channels, out, kernel = draw.integer(1, 16), draw.integer(1, 24), draw.integer(1, 4)
    weight, bias, steps = draw.weights(out, channels, kernel, kernel)
    x, stride = draw.scale(), draw.integer(1, min(2, kernel))
    y = draw.sum_scale(x, steps, channels * kernel)
    nodes, name = _activated(draw, "conv")
    strides = [stride, stride]
    nodes.insert(0, helper.make_node("ConvTranspose", ["x", "w", "b"], [name], "conv", strides=strides))
    size = (channels, draw.integer(4, 9), draw.integer(4, 9))
    arrays = {"w": weight.swapaxes(0, 1), "b": bias} | _BOUNDS
    return draw.case(nodes, size, {"x": x, "y": y, "c": y}, arrays)


def _fully_connected(draw: _Draw) -> Case:
    inner, out = draw.integer(1, 300), draw.integer(1, 64)
    weight, bias, steps = draw.weights(out, inner)
    x = draw.scale()
    y = draw.sum_scale(x, steps, inner)
    nodes, name = _activated(draw, "gemm")
    nodes.insert(0, helper.make_node("Gemm", ["x", "w", "b"], [name], "gemm", transB=1))
    return draw.case(nodes, (inner,), {"x": x, "y": y, "c": y}, {"w": weight, "b": bias} | _BOUNDS, 128)


def _pair(draw: _Draw, op: str, **attributes: object) -> Case:
    """Operands "a" and "b" come from layers that are not judged; here any codes stand for them."""
    channels = draw.integer(2, 8)
    one = np.ones((channels, channels, 1, 1), np.float32)
    a, b = draw.scale(), draw.scale()
    wide = a.scale * b.scale * 64 if op in ("Mul", "MatMul") else max(a.scale, b.scale)
    wide *= 16 if op == "MatMul" else 1
    ratio = draw.rng.choice([0.5, 1.0, 2.0]) if draw.powers else draw.rng.uniform(0.5, 2)
    y = Scale(float(wide * ratio), draw.scale().zero_point)
    if op not in ("Concat", "MatMul") and draw.rng.random() < 0.3:
        nodes, name = _activated(draw, op)
    else:
        nodes, name = [], "y"
    nodes = [
        helper.make_node("Conv", ["x", "one"], ["a"], "conv_a"),
        helper.make_node("Conv", ["x", "one"], ["b"], "conv_b"),
        helper.make_node(op, ["a", "b"], [name], "pair", **attributes),
        *nodes,
    ]
    named = {"x": Scale(1.0, 0), "a": a, "b": b, "y": y, "c": y}
    return draw.case(nodes, (channels, 16, 16), named, {"one": one} | _BOUNDS, 4)


def _unary(
    draw: _Draw,
    op: str,
    y: Scale | None = None,
    initializers=None,
    more: tuple = (),
    batch: int = 4,
    **attributes,
) -> Case:
    x = draw.scale()
    y = y or Scale(x.scale * float(draw.rng.choice([0.5, 1.0, 1.7, 2.0])), draw.scale().zero_point)
    if draw.powers:
        y = Scale(2.0 ** np.round(np.log2(y.scale)), y.zero_point)
    node = helper.make_node(op, ["x", *more], ["y"], "unary", **attributes)
    size = (draw.integer(1, 24), draw.integer(4, 16), draw.integer(4, 16))
    return draw.case([node], size, {"x": x, "y": y}, initializers, batch)


def _pool(draw: _Draw, op: str) -> Case:
    kernel = [draw.integer(1, 4), draw.integer(1, 4)]
    attributes = {"kernel_shape": kernel, "strides": [draw.integer(1, 3), draw.integer(1, 3)]}
    if draw.rng.random() < 0.5:
        attributes["auto_pad"] = "SAME_UPPER"
    elif draw.rng.random() < 0.3:
        attributes["pads"] = [draw.integer(0, k - 1) for k in kernel * 2]
    return _unary(draw, op, **attributes)


def _lone_clamp(draw: _Draw) -> Case:
    if draw.rng.random() < 0.5:
        return _unary(draw, "Relu")
    return _unary(draw, "Clip", initializers=_BOUNDS, more=("zero", "six"))


def _padded(draw: _Draw) -> Case:
    sides = [0, 0, draw.integer(0, 3), draw.integer(0, 3)] * 2
    return _unary(draw, "Pad", initializers={"pads": np.array(sides, np.int64)}, more=("pads",))


def _resized(draw: _Draw, mode: str, position: str) -> Case:
    scales = np.array([1, 1, draw.integer(2, 3), draw.integer(2, 3)], np.float32)
    fields = {"mode": mode, "coordinate_transformation_mode": position, "nearest_mode": "floor"}
    return _unary(draw, "Resize", initializers={"scales": scales}, more=("", "scales"), **fields)


DRAWS: dict[str, Callable[[_Draw], Case]] = {
    "convolution": lambda d: _convolution(d, "plain"),
    "pointwise convolution": lambda d: _convolution(d, "pointwise"),
    "dilated convolution": lambda d: _convolution(d, "dilated"),
    "depthwise convolution": lambda d: _convolution(d, "depthwise"),
    "grouped convolution": lambda d: _convolution(d, "grouped"),
    "transposed convolution": _transposed_convolution,
    "fully connected": _fully_connected,
    "add": lambda d: _pair(d, "Add"),
    "sub": lambda d: _pair(d, "Sub"),
    "mul": lambda d: _pair(d, "Mul"),
    "product of activations": lambda d: _pair(d, "MatMul"),
    "concat": lambda d: _pair(d, "Concat", axis=1),
    "max pool": lambda d: _pool(d, "MaxPool"),
    "average pool": lambda d: _pool(d, "AveragePool"),
    "mean": lambda d: _unary(d, "GlobalAveragePool", batch=96),
    "pad": _padded,
    "relu": _lone_clamp,
    "sigmoid": lambda d: _unary(d, "Sigmoid", Scale(1 / 256, -128)),
    "tanh": lambda d: _unary(d, "Tanh", Scale(1 / 128, 0)),
    "leaky relu": lambda d: _unary(d, "LeakyRelu", alpha=float(d.rng.uniform(0, 0.5))),
    "resize nearest": lambda d: _resized(d, "nearest", "asymmetric"),
    "resize bilinear": lambda d: _resized(d, "linear", str(d.rng.choice(["half_pixel", "asymmetric"]))),
    "hard swish": lambda d: _unary(d, "HardSwish"),
}


def cases(operator: str, seed: int) -> Iterator[Case]:
    """Endless cases of an operator of `DRAWS`."""
    while True:
        yield DRAWS[operator](_Draw(seed))
        seed += 1
