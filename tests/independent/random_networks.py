"""Random float networks: odd shapes, uneven pads, dead channels, tiny and wide ranges."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .formulas import same_pads
from .quantizer import Ranges
from .reading import FloatNetwork, read

BATCH = 2


@dataclass(frozen=True)
class Subject:
    """A float network with what it is judged on.

    Attributes:
        name: for reports.
        model: ONNX bytes.
        float_network: the same, read.
        ranges: (min, max) by value name.
        codes: input, int8 (n, ...).
    """

    name: str
    model: bytes
    float_network: FloatNetwork
    ranges: Ranges
    codes: np.ndarray


@dataclass
class _Draw:
    """A network as it grows.

    Attributes:
        x: the newest tensor.
        shape: of it, without the batch.
        older: what a later block may join again.
        level: decimal exponent of the newest tensor's values, roughly.
        spelled_out: explicit pads of nodes with dilations and SAME padding, which ONNX Runtime does not run.
    """

    rng: np.random.Generator
    for_tflite: bool
    nodes: list = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    x: str = "x"
    shape: tuple[int, int, int] = (1, 1, 1)
    older: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)
    level: float = 0.0
    spelled_out: dict[str, list[int]] = field(default_factory=dict)

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def choose(self, *options: str) -> str:
        return str(self.rng.choice(options))

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value if value.dtype == np.int64 else value.astype(np.float32)
        return name

    def node(self, op: str, inputs: list[str], **fields: object) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], f"n{len(self.nodes)}", **fields))
        return output

    def grow(self, output: str, shape: tuple[int, int, int], level: float | None = None) -> None:
        """A block is complete."""
        self.older.append((self.x, self.shape))
        self.x, self.shape = output, shape
        self.level = self.level if level is None else level

    def window(self, kernel: list[int], dilations: list[int], pool: str = "") -> tuple[dict, list[int]]:
        """Attributes of a window on the newest tensor, and the output's height and width."""
        size, strides = self.shape[1:], [self.integer(1, 3), self.integer(1, 2)]
        tflite_average = self.for_tflite and pool == "AveragePool"
        if pool:  # ONNX Runtime computes negative pads where a window is narrower than its stride
            strides = [min(s, k) for s, k in zip(strides, kernel, strict=True)]
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        padding = self.choose("SAME_UPPER", "SAME_LOWER", "pads", "pads", "VALID", "")
        if any(r > n for r, n in zip(reach, size, strict=True)):
            padding = self.choose("SAME_UPPER", "SAME_LOWER")
        if tflite_average and padding in ("SAME_LOWER", "pads"):
            padding = "SAME_UPPER"
        fields: dict = {"strides": strides, "dilations": dilations, "kernel_shape": kernel}
        if padding.startswith("SAME"):
            fields["auto_pad"] = padding
            return fields, [-(-n // s) for n, s in zip(size, strides, strict=True)]
        pads = [0] * 4
        if padding == "pads":
            limits = [k - 1 if pool else r for k, r in zip(kernel, reach, strict=True)]
            pads = fields["pads"] = [self.integer(0, limit) for limit in limits * 2]
        elif padding == "VALID":
            fields["auto_pad"] = "VALID"
        outputs = [(size[i] + pads[i] + pads[i + 2] - reach[i]) // strides[i] + 1 for i in (0, 1)]
        return fields, outputs

    def weight(self, level: float, out: int, *inner: int) -> np.ndarray:
        """Skewed weights that bring values to a level, some channels dead or almost, some all negative."""
        spread = np.exp(self.rng.uniform(-2, 2, (out, *[1] * len(inner))))
        weight = self.rng.normal(self.rng.uniform(-0.5, 0.5), 1, (out, *inner)) * spread
        weight *= 10.0 ** (level - self.level) / np.sqrt(np.prod(inner))
        if self.chance(0.3):
            weight[self.rng.random(out) < 0.3] *= float(self.rng.choice([0, 1e-10]))
        if self.chance(0.3):
            some = self.rng.random(out) < 0.3
            weight[some] = -np.abs(weight[some])
        return weight

    def activated(self, y: str, level: float) -> str:
        """Perhaps an activation behind a layer.

        One with an upper end only where values are not very far above it: there engines abort or overflow.
        """
        kinds = ["Relu", ""]
        if level <= 2:
            kinds += ["Relu6"] if self.for_tflite else ["Relu6", "Clip", "Low"]
        kind = self.choose(*kinds)
        if kind == "Relu":
            return self.node("Relu", [y])
        bounds = {"Relu6": (0.0, 6.0), "Clip": (-self.rng.uniform(0, 3), self.rng.uniform(0.1, 9))}
        if kind in bounds:
            return self.node("Clip", [y, *(self.constant(np.array(b)) for b in bounds[kind])])
        if kind == "Low":
            return self.node("Clip", [y, self.constant(np.array(self.rng.uniform(-1, 0.5)))])
        return y

    def channel_numbers(self, low: float, high: float, channels: int) -> str:
        return self.constant(self.rng.uniform(low, high, channels))

    def batch_norm(self, y: str, channels: int) -> str:
        """Variances down to a size at which epsilon counts; factors of about 1."""
        epsilon, variance = 10.0 ** self.rng.uniform(-5, -2), 10.0 ** self.rng.uniform(-6, 2, channels)
        gamma = self.rng.uniform(-1.5, 2, channels) * np.sqrt(variance + epsilon)
        names = [self.constant(gamma), self.channel_numbers(-1, 1, channels)]
        names += [self.channel_numbers(-1, 1, channels), self.constant(variance)]
        return self.node("BatchNormalization", [y, *names], epsilon=epsilon)

    def scaled(self, y: str, channels: int, rank: int) -> str:
        """Perhaps numbers a channel behind a layer, once or several times.

        A single number is no number a channel: with an activation behind it, it is a function of one
        activation and becomes a table.
        """
        kinds = ["norm", "Add", "Mul", "Sub", "Div"] if channels > 1 else ["norm"]
        for kind in self.rng.choice(kinds, min(len(kinds), self.integer(0, 2)), replace=False):
            if kind == "norm":
                y = self.batch_norm(y, channels)
                continue
            value = self.rng.uniform(0.2, 2, (channels, 1, 1) if rank == 4 else channels)
            operands = [y, self.constant(value * self.rng.choice([-1, 1], value.shape))]
            y = self.node(kind, operands[::-1] if kind == "Sub" and self.chance(0.5) else operands)
        return y

    def convolved(self, kind: str, out: int | None = None) -> tuple[str, tuple[int, int, int], float]:
        """A convolution of the newest tensor with what follows it; `out`: keep its size, so many channels."""
        channels, keep, level = self.shape[0], out is not None, float(self.rng.uniform(-2, 2))
        groups, kernel = 1, [self.integer(1, 5), self.integer(1, 4)]
        dilations = [self.integer(1, 3), self.integer(1, 2)] if self.chance(0.25) else [1, 1]
        out = out or self.integer(1, 20)
        if kind == "pointwise":
            kernel = dilations = [1, 1]
        elif kind == "depthwise":
            groups, out = channels, channels * self.integer(1, 2 if channels < 12 else 1)
        elif kind == "grouped":
            groups = next(g for g in (3, 2, 5, 1) if channels % g == 0)
            out = groups * self.integer(1, 5)
        if keep:
            fields = {"kernel_shape": kernel, "dilations": dilations, "strides": [1, 1]}
            fields["auto_pad"] = self.choose("SAME_UPPER", "SAME_LOWER")
            height, width = self.shape[1:]
        else:
            fields, (height, width) = self.window(kernel, dilations)
        if self.chance(0.1):
            del fields["kernel_shape"]
        names = [self.x, self.constant(self.weight(level, out, channels // groups, *kernel))]
        if self.chance(0.6):
            names.append(self.constant(self.rng.normal(0, 2, out)))
        y = self.node("Conv", names, group=groups, **fields)
        if dilations != [1, 1] and fields.get("auto_pad", "").startswith("SAME"):
            upper = fields["auto_pad"] == "SAME_UPPER"
            self.spelled_out[y] = same_pads(self.shape[1:], kernel, fields["strides"], dilations, upper)
        return self.activated(self.scaled(y, out, 4), level), (out, height, width), level


def _convolution(d: _Draw) -> None:
    d.grow(*d.convolved(d.choose("plain", "plain", "pointwise", "depthwise", "depthwise", "grouped")))


def _transposed_convolution(d: _Draw) -> None:
    channels, out, level = d.shape[0], d.integer(1, 12), float(d.rng.uniform(-2, 2))
    kernel = [d.integer(1, 4), d.integer(1, 3)]
    strides = [d.integer(1, min(2, k)) if n < 20 else 1 for k, n in zip(kernel, d.shape[1:], strict=True)]
    whole = [(n - 1) * s + k for n, s, k in zip(d.shape[1:], strides, kernel, strict=True)]
    pads = [d.integer(0, min(k - 1, (n - 1) // 2)) for k, n in zip(kernel * 2, whole * 2, strict=True)]
    weight = d.weight(level, out, channels, *kernel).swapaxes(0, 1)
    names = [d.x, d.constant(weight), d.constant(d.rng.normal(0, 2, out))]
    y = d.node("ConvTranspose", names, strides=strides, pads=pads)
    size = [whole[i] - pads[i] - pads[i + 2] for i in (0, 1)]
    d.grow(d.activated(d.scaled(y, out, 4), level), (out, *size), level)


def _padded_convolution(d: _Draw) -> None:
    """Zeros around, which may become the convolution's own padding."""
    c, h, w = d.shape
    sides = [d.integer(0, 2) for _ in range(4)]
    pads = d.constant(np.array([0, 0, *sides[:2], 0, 0, *sides[2:]], np.int64))
    d.grow(d.node("Pad", [d.x, pads]), (c, h + sides[0] + sides[2], w + sides[1] + sides[3]))
    if d.chance(0.7):
        d.older.pop()  # nobody else reads it
        padded = d.x
        _convolution(d)
        d.older = [tensor for tensor in d.older if tensor[0] != padded]


def _joined(d: _Draw, op: str) -> None:
    """A branch with its own convolution comes back to the newest tensor, or to an older one."""
    alike = [name for name, shape in d.older if shape == d.shape and name != "x"]
    other = d.x if not alike or d.chance(0.5) else str(d.rng.choice(alike))
    branch, shape, level = d.convolved("plain", d.shape[0])
    names = [branch, other] if d.chance(0.5) else [other, branch]
    level = level + d.level if op == "Mul" else max(level, d.level)
    d.grow(d.activated(d.node(op, names), math.inf if op == "Mul" else level), shape, level)


def _concatenated(d: _Draw) -> None:
    branches = [d.convolved("plain", d.integer(1, 6))[0] for _ in range(d.integer(1, 2))]
    if d.chance(0.4):
        branches.append(d.node("MaxPool", [d.x], kernel_shape=[3, 3], auto_pad="SAME_UPPER"))
    names = [d.x, *branches]
    d.rng.shuffle(names)
    widths = {c.output[0]: c for c in d.nodes}
    total = d.shape[0] + sum(_channels(d, widths[b]) for b in branches)
    d.grow(d.node("Concat", names, axis=1), (total, *d.shape[1:]))


def _channels(d: _Draw, node) -> int:
    """Output channels of the convolution behind a node, by its weight; of a pool, the newest tensor's."""
    by_output = {n.output[0]: n for n in d.nodes}
    while node.op_type != "Conv":
        if node.op_type == "MaxPool":
            return d.shape[0]
        source = next(name for name in node.input if name in by_output)
        node = by_output[source]
    return len(d.constants[node.input[1]])


def _pooled(d: _Draw, op: str) -> None:
    kernel = [min(d.integer(1, 4), d.shape[1]), min(d.integer(2, 3), d.shape[2])]
    fields, size = d.window(kernel, [1, 1], op)
    del fields["dilations"]
    if op == "AveragePool" and "pads" in fields and d.chance(0.4):
        fields["count_include_pad"] = 1
    y = d.node(op, [d.x], **fields)
    d.grow(d.node("Relu", [y]) if d.chance(0.2) else y, (d.shape[0], *size))


def _lone_norm(d: _Draw) -> None:
    """Numbers a channel that find no weights before them (pre-activation networks)."""
    y = d.x if d.x == "x" else d.node("MaxPool", [d.x], kernel_shape=[1, 1])
    d.grow(d.activated(d.batch_norm(y, d.shape[0]), d.level), d.shape)


def _head(d: _Draw) -> str:
    channels, kind = d.shape[0], d.choose("global", "mean", "kept", "flatten")
    if kind == "flatten" and np.prod(d.shape) <= 600:
        y, channels = d.node("Flatten", [d.x]), int(np.prod(d.shape))
    elif kind == "mean":
        axes = d.constant(np.array([2, 3] if d.chance(0.5) else [-1, -2], np.int64))
        y = d.node("ReduceMean", [d.x, axes], keepdims=0)
    else:
        y = d.node("Flatten", [d.node("GlobalAveragePool", [d.x])])
    hidden, classes = d.integer(3, 30), d.integer(2, 12)
    weight = d.weight(0, hidden, channels)
    turned = d.chance(0.5)
    names = [y, d.constant(weight if turned else weight.T), d.constant(d.rng.normal(0, 1, hidden))]
    scale = {"alpha": float(d.rng.uniform(0.3, 2)), "beta": float(d.rng.uniform(0.3, 2))}
    y = d.node("Gemm", names, transB=int(turned), **(scale if d.chance(0.5) else {}))
    y = d.activated(d.scaled(y, hidden, 2), 0)
    d.level = 0
    y = d.node("MatMul", [y, d.constant(d.weight(0, classes, hidden).T)])
    return d.node("Add", [y, d.constant(d.rng.normal(0, 1, classes))]) if d.chance(0.7) else y


_BLOCKS: dict[str, tuple[float, Callable[[_Draw], None]]] = {
    "convolution": (6, _convolution),
    "padded convolution": (1.5, _padded_convolution),
    "add": (2, lambda d: _joined(d, "Add")),
    "mul": (1, lambda d: _joined(d, "Mul")),
    "transposed convolution": (1, _transposed_convolution),
    "sub": (1, lambda d: _joined(d, "Sub")),
    "concat": (1.5, _concatenated),
    "max pool": (1, lambda d: _pooled(d, "MaxPool")),
    "average pool": (1, lambda d: _pooled(d, "AveragePool")),
    "norm": (1, _lone_norm),
}

_ONLY_TFLITE = ("sub", "transposed convolution")


def draw(seed: int, for_tflite: bool = False) -> Subject:
    """A random network whose numbers engines can hold.

    Args:
        seed: of everything.
        for_tflite: what TFLite's operators can say: Sub and ConvTranspose too, but bounds of RELU and RELU6
            and averages that pad as SAME_UPPER only.
    """
    attempts = (_attempt(seed, 70 + for_tflite + 2 * attempt, for_tflite) for attempt in itertools.count())
    return next(subject for subject in attempts if _is_in_proportion(subject.float_network))


def _is_in_proportion(network: FloatNetwork) -> bool:
    """No bound lies so far from the values that an engine's 32 bits overflow, or it aborts."""
    for node in network.nodes:
        if node.op == "Clip":
            bound = max(abs(float(bound)) for bound in node.constants.values())
            before, after = (
                max(abs(end) for end in network.ranges[name]) for name in (node.inputs[0], node.output)
            )
            if before > 1e4 * bound or 0 < after < 1e-4 * bound:
                return False
    return True


def _attempt(seed: int, stream: int, for_tflite: bool) -> Subject:
    rng = np.random.default_rng([seed, stream])
    d = _Draw(rng, for_tflite)
    d.shape = (d.integer(1, 6), d.integer(7, 21), d.integer(7, 21))
    shape = [BATCH, *d.shape]
    odds = np.array([weight for weight, _ in _BLOCKS.values()])
    _convolution(d)
    for name in rng.choice(list(_BLOCKS), d.integer(4, 10), p=odds / odds.sum()):
        if (name == "concat" and d.shape[0] > 60) or (name in _ONLY_TFLITE and not for_tflite):
            continue
        _BLOCKS[str(name)][1](d)
    output = _head(d)
    graph = helper.make_graph(
        d.nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "classes"])],
        [numpy_helper.from_array(array, name) for name, array in d.constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = proto.SerializeToString()
    images = rng.normal(rng.uniform(-1, 1), 1, shape).astype(np.float32)
    for node in proto.graph.node:
        if node.output[0] in d.spelled_out:
            kept = [a for a in node.attribute if a.name != "auto_pad"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("pads", d.spelled_out[node.output[0]])])
    network = read(proto.SerializeToString(), images)
    disturbed = {name: _disturbed(rng, *span) for name, span in network.ranges.items()}
    ranges = {name: (float(np.float32(a)), float(np.float32(b))) for name, (a, b) in disturbed.items()}
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    return Subject(f"random {seed}", model, network, ranges, codes)


def _disturbed(rng: np.random.Generator, low: float, high: float) -> tuple[float, float]:
    """A calibrated range, or one that clips, is far too wide, or does not contain 0."""
    if low >= high:
        return min(low, 0.0) - 1.0, max(high, 0.0) + 1.0
    kind = rng.choice(["as it is", "clips", "wide", "above", "below"], p=[0.5, 0.2, 0.1, 0.1, 0.1])
    if kind == "clips":
        factor = rng.uniform(0.3, 0.9)
        return low * factor, high * factor
    if kind == "wide":
        return low - abs(high) * rng.uniform(0, 9), high + abs(low) * rng.uniform(0, 9)
    largest = max(abs(low), abs(high))
    if kind == "above":
        return largest * 0.2, largest
    if kind == "below":
        return -largest, -largest * 0.3
    return low, high
