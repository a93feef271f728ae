"""Random layers of every operator: shapes, windows, scales (of few bits too: ties), extremes."""

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


BITS = (1, 4, 24)
"""Of the mantissas of scales: powers of two, small integers times these, any. What has few bits has ties, and
they tell rules apart that agree elsewhere."""


def rounded(x: np.ndarray | float, bits: int) -> np.ndarray:
    """To so many bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 2.0**bits), exponent - bits)


class _Draw:
    """Draws one case."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.bits = int(self.rng.choice(BITS))
        self.extreme = self.chance(0.15)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def length(self, least: int = 1) -> int:
        """Of an image's side: mostly short, so that there are many cases; of any remainder by 2, 4, 8, 16."""
        return self.integer(least, max(least, 19 if self.chance(0.2) else 9))

    def image(self, channels: int = 24) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.integer(1, channels), self.length(), self.length()

    def scale(self) -> Scale:
        """Mostly as networks have them; now and then tiny or wide."""
        low, high = (2.0**-12, 2.0**4) if self.chance(0.25) else (0.01, 0.2)
        zero_point = int(self.rng.choice([-128, 127, -1, 0, 3, self.integer(-128, 127)]))
        return Scale(float(self.rounded(np.exp(self.rng.uniform(np.log(low), np.log(high))))), zero_point)

    def rounded(self, x: np.ndarray | float) -> np.ndarray:
        """To the number of bits that this case's scales have."""
        return rounded(x, self.bits)

    def near(self, scale: float) -> Scale:
        """An output's scale: around another one, now and then far from it."""
        ratio = self.rng.uniform(0.5, 2)
        ratio *= self.rng.choice([2.0**-4, 2.0**4]) if self.chance(0.1) else 1
        return Scale(float(self.rounded(scale * ratio)), self.scale().zero_point)

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

    def weights(self, out: int, *inner: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight, and the scale of each output channel; -127 and 127 are among the codes.

        Now and then a channel is dead, a channel is one number, or the scales of channels lie far apart.
        """
        codes = self.rng.integers(-127, 128, (out, *inner))
        rows = codes.reshape(out, -1)
        rows[:, 0] = 127
        if self.chance(0.2):
            rows[self.integer(0, out - 1)] = int(self.rng.choice([0, 127, -127]))
        column = (out, *[1] * len(inner))
        steps = self.rounded(self.rng.uniform(0.002, 0.03, column))
        if self.chance(0.15):
            steps = steps * 2.0 ** -self.rng.integers(0, 16, column)
        return (codes * steps).astype(np.float32), steps

    def sums(self, x: Scale, steps: np.ndarray, terms: int) -> tuple[Scale, np.ndarray]:
        """A scale in which sums fill the codes, some of them beyond; and a bias that fits it."""
        y = self.near(x.scale * float(steps.max()) * 73 * 74 * np.sqrt(terms) / 50)
        out = len(steps)
        if self.chance(0.1):
            # The bias nearly fills 32 bits; the output's scale follows it.
            bias = self.rng.uniform(-(2.0**30), 2.0**30, out) * steps.reshape(-1) * x.scale
            return Scale(y.scale * 2.0**14, y.zero_point), bias.astype(np.float32)
        bias = self.rng.normal(0, 30 * y.scale, out)
        return y, bias.astype(np.float32)


def _activated(draw: _Draw, node: str, y: Scale) -> tuple[list, str, dict[str, np.ndarray]]:
    """Perhaps an activation behind a node's output: nodes, the name of that output, and constants."""
    kind = str(draw.rng.choice(["", "Relu", "Clip"]))
    if kind == "Relu":
        return [helper.make_node("Relu", ["c"], ["y"], "act")], "c", {}
    if kind == "Clip":
        low, high = ((0, 6), (-1, 1))[draw.integer(0, 1)]
        bounds = {"low": np.array(low, np.float32), "high": np.array(high, np.float32)}
        return [helper.make_node("Clip", ["c", "low", "high"], ["y"], "act")], "c", bounds
    return [], "y", {}


def _padding(draw: _Draw, kernel: list[int], most: int) -> dict[str, object]:
    """Any padding: none, as much as the output needs, or up to kernel - 1 + `most` on each side."""
    kind = draw.integer(0, 3)
    if kind == 0:
        return {"auto_pad": str(draw.rng.choice(["SAME_UPPER", "SAME_LOWER"]))}
    return {"pads": [draw.integer(0, k - 1 + most) for k in kernel * 2]} if kind == 1 else {}


def _convolution(draw: _Draw, kind: str) -> Case:
    groups, dilations = 1, [1, 1]
    kernel, strides = [draw.integer(1, 5), draw.integer(1, 5)], [draw.integer(1, 3), draw.integer(1, 3)]
    channels, out = draw.integer(1, 24), draw.integer(1, 32)
    if kind == "pointwise":
        kernel, channels, out = [1, 1], draw.integer(1, 130), draw.integer(1, 67)
    elif kind == "dilated":
        dilations = [draw.integer(1, 3), draw.integer(2, 3)]
    elif kind == "depthwise":
        channels = groups = draw.integer(2, 33)
        out = channels * draw.integer(1, 3)
        dilations = [draw.integer(1, 2), draw.integer(1, 2)] if draw.chance(0.3) else dilations
    elif kind == "grouped":
        groups = draw.integer(2, 4)
        channels, out = groups * draw.integer(2, 8), groups * draw.integer(1, 8)
    weight, steps = draw.weights(out, channels // groups, *kernel)
    x = draw.scale()
    y, bias = draw.sums(x, steps, int(np.prod(weight.shape[1:])))
    attributes = {"strides": strides, "dilations": dilations, "group": groups, "kernel_shape": kernel}
    attributes |= _padding(draw, kernel, 2)
    nodes, name, bounds = _activated(draw, "conv", y)
    nodes.insert(0, helper.make_node("Conv", ["x", "w", "b"], [name], "conv", **attributes))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = (channels, *(draw.length(least) for least in reach))
    return draw.case(nodes, size, {"x": x, "y": y, "c": y}, {"w": weight, "b": bias} | bounds)


def _transposed_convolution(draw: _Draw) -> Case:
    channels, out, kernel = draw.integer(1, 16), draw.integer(1, 24), [draw.integer(1, 4) for _ in "hw"]
    weight, steps = draw.weights(out, channels, *kernel)
    x, strides = draw.scale(), [draw.integer(1, min(3, k)) for k in kernel]
    y, bias = draw.sums(x, steps, channels * kernel[0])
    nodes, name, bounds = _activated(draw, "conv", y)
    nodes.insert(0, helper.make_node("ConvTranspose", ["x", "w", "b"], [name], "conv", strides=strides))
    size = (channels, draw.integer(1, 9), draw.integer(1, 9))
    return draw.case(nodes, size, {"x": x, "y": y, "c": y}, {"w": weight.swapaxes(0, 1), "b": bias} | bounds)


def _fully_connected(draw: _Draw) -> Case:
    inner, out = draw.integer(1, 300), draw.integer(1, 65)
    weight, steps = draw.weights(out, inner)
    x = draw.scale()
    y, bias = draw.sums(x, steps, inner)
    nodes, name, bounds = _activated(draw, "gemm", y)
    nodes.insert(0, helper.make_node("Gemm", ["x", "w", "b"], [name], "gemm", transB=1))
    arrays = {"w": weight, "b": bias} | bounds
    return draw.case(nodes, (inner,), {"x": x, "y": y, "c": y}, arrays, draw.integer(1, 129))


def _operand(draw: _Draw, name: str, out: int, channels: int) -> tuple[list, dict[str, np.ndarray]]:
    """A layer that is not judged, since any codes stand for its output: `out` channels of `channels`."""
    node = helper.make_node("Conv", ["x", f"w_{name}"], [name], f"conv_{name}")
    return [node], {f"w_{name}": np.ones((out, channels, 1, 1), np.float32)}


def _pair(draw: _Draw, op: str, activated: float = 0.3) -> Case:
    """Two operands of one shape, or of two that broadcast; how often an activation follows."""
    shape = draw.image(channels=9)
    a, b = draw.scale(), draw.scale()
    y = draw.near(a.scale * b.scale * 64 if op == "Mul" else max(a.scale, b.scale))
    nodes, arrays = _operand(draw, "a", shape[0], shape[0])
    kind = str(draw.rng.choice(["", "", "", "one channel", "one pixel", "one row"]))
    reduced = kind in ("one pixel", "one row")
    out = 1 if kind == "one channel" else shape[0]
    more, extra = _operand(draw, "b0" if reduced else "b", out, shape[0])
    if reduced:
        axes = np.array([2, 3] if kind == "one pixel" else [2])
        more.append(helper.make_node("ReduceMean", ["b0", "axes"], ["b"], "mean", keepdims=1))
        extra["axes"] = axes
    activation, name, bounds = _activated(draw, op, y) if draw.chance(activated) else ([], "y", {})
    order = ["b", "a"] if draw.chance(0.5) else ["a", "b"]
    nodes = [*nodes, *more, helper.make_node(op, order, [name], "pair"), *activation]
    named = {"x": Scale(1.0, 0), "a": a, "b": b, "b0": b, "y": y, "c": y}
    return draw.case(nodes, shape, named, arrays | extra | bounds, draw.integer(1, 5))


def _with_constant(draw: _Draw) -> Case:
    """An activation beside a constant that differs from place to place, and so is no layer's weight."""
    op = str(draw.rng.choice(["Add", "Sub", "Mul", "Div", "Concat"]))
    shape, x = draw.image(channels=9), draw.scale()
    size = shape if op == "Concat" else (shape[0] if draw.chance(0.5) else 1, *shape[1:])
    reals = draw.rng.normal(0, 50 * x.scale, (1, *size))
    if op == "Div":
        reals = np.copysign(draw.rng.uniform(0.2, 5, reals.shape), reals)
    largest = float(np.abs(reals).max())
    sizes = {"Mul": x.scale * largest / 2, "Div": x.scale * 4}
    y = draw.near(sizes.get(op, max(x.scale, largest / 127)))
    order = ["k", "x"] if op in ("Add", "Sub", "Mul") and draw.chance(0.5) else ["x", "k"]
    fields = {"axis": draw.integer(1, 3)} if op == "Concat" else {}
    node = helper.make_node(op, order, ["y"], "constant", **fields)
    return draw.case([node], shape, {"x": x, "y": y}, {"k": reals.astype(np.float32)}, draw.integer(1, 5))


def _sum_over_pixels(draw: _Draw) -> Case:
    x, shape = draw.scale(), draw.image(channels=24)
    y = draw.near(x.scale * np.sqrt(shape[1] * shape[2]) * float(draw.rng.choice([0.5, 1, 4])))
    axes = {"axes": np.array([2, 3], np.int64)}
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], "sum", keepdims=draw.integer(0, 1))
    return draw.case([node], shape, {"x": x, "y": y}, axes, draw.integer(1, 97))


def _product(draw: _Draw) -> Case:
    """A matrix product needs squares here: both factors come from one image."""
    channels, size = draw.integer(1, 8), draw.integer(1, 19)
    a, b = draw.scale(), draw.scale()
    y = draw.near(a.scale * b.scale * 1024)
    nodes, arrays = _operand(draw, "a", channels, channels)
    more, extra = _operand(draw, "b", channels, channels)
    nodes = [*nodes, *more, helper.make_node("MatMul", ["a", "b"], ["y"], "product")]
    named = {"x": Scale(1.0, 0), "a": a, "b": b, "y": y}
    return draw.case(nodes, (channels, size, size), named, arrays | extra, draw.integer(1, 5))


def _concatenation(draw: _Draw) -> Case:
    """Two to five operands along any axis; along the channels they differ in size."""
    shape, count, axis = draw.image(channels=9), draw.integer(2, 5), draw.integer(1, 3)
    names = [f"a{i}" for i in range(count)]
    nodes, arrays, scales = [], {}, {"x": Scale(1.0, 0)}
    for name in names:
        out = draw.integer(1, 9) if axis == 1 else shape[0]
        more, extra = _operand(draw, name, out, shape[0])
        nodes, arrays, scales = nodes + more, arrays | extra, scales | {name: draw.scale()}
    largest = max(scales[name].scale for name in names)
    scales["y"] = scales[names[0]] if draw.chance(0.2) else draw.near(largest)
    nodes.append(helper.make_node("Concat", names, ["y"], "join", axis=axis))
    return draw.case(nodes, shape, scales, arrays, draw.integer(1, 5))


def _unary(
    draw: _Draw,
    op: str,
    y: Scale | None = None,
    initializers=None,
    more: tuple = (),
    batch: int = 4,
    size: tuple[int, ...] | None = None,
    **attributes,
) -> Case:
    x = draw.scale()
    node = helper.make_node(op, ["x", *more], ["y"], "unary", **attributes)
    scales = {"x": x, "y": y or draw.near(x.scale)}
    return draw.case([node], size or draw.image(), scales, initializers, batch)


def _pool(draw: _Draw, op: str) -> Case:
    kernel = [draw.integer(1, 4), draw.integer(1, 4)]
    strides = [draw.integer(1, 3), draw.integer(1, 3)]
    attributes = {"kernel_shape": kernel, "strides": strides} | _padding(draw, kernel, 0)
    if "auto_pad" not in attributes:
        attributes["ceil_mode"] = draw.integer(0, 1)
    if op == "AveragePool":
        attributes["count_include_pad"] = draw.integer(0, 1)
    elif draw.chance(0.2):
        attributes["dilations"] = [draw.integer(1, 2), draw.integer(1, 2)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, attributes.get("dilations", [1, 1]), strict=True)]
    return _unary(draw, op, size=(draw.integer(1, 24), *(draw.length(r) for r in reach)), **attributes)


def _lone_clamp(draw: _Draw) -> Case:
    if draw.chance(0.4):
        return _unary(draw, "Relu")
    low, high = ((0, 6), (0, 6), (-1, 1))[draw.integer(0, 2)]
    bounds = {"low": np.array(low, np.float32), "high": np.array(high, np.float32)}
    # Half of the time the bound lies between two codes.
    y = Scale(high / (draw.integer(0, 5) + 0.5), draw.scale().zero_point) if draw.chance(0.5) else None
    return _unary(draw, "Clip", y, bounds, ("low", "high"))


def _padded(draw: _Draw) -> Case:
    sides = [0, *(draw.integer(0, 3) for _ in range(3)), 0, *(draw.integer(0, 3) for _ in range(3))]
    return _unary(draw, "Pad", initializers={"pads": np.array(sides, np.int64)}, more=("pads",))


def _resized(draw: _Draw, mode: str, position: str) -> Case:
    scales = np.array([1, 1, *draw.rng.permutation([draw.integer(1, 4), draw.integer(2, 4)])], np.float32)
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
    "max and min": lambda d: _pair(d, str(d.rng.choice(["Max", "Min"])), activated=0),
    "product of activations": _product,
    "concat": _concatenation,
    "constant operands": _with_constant,
    "max pool": lambda d: _pool(d, "MaxPool"),
    "average pool": lambda d: _pool(d, "AveragePool"),
    "mean": lambda d: _unary(d, "GlobalAveragePool", batch=d.integer(1, 97)),
    "reduce sum": _sum_over_pixels,
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
