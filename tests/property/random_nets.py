"""Random small networks as ONNX bytes with ranges, drawn by hypothesis."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper


@dataclass
class NetBuilder:
    """Appends random layers; remembers each activation's shape (channels, height, width)."""

    rng: np.random.Generator
    nodes: list = field(default_factory=list)
    initializers: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def emit(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes) -> str:
        """Appends a node."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"node_{len(self.nodes)}", **attributes))
        self.shapes[name] = shape
        return name

    def weight(self, *shape: int) -> str:
        """Adds a random initializer; now and then a channel of it is all zero."""
        array = self.rng.normal(0, 0.4, shape).astype(np.float32)
        if self.rng.random() < 0.1:
            array[0] = 0
        name = f"w{len(self.initializers)}"
        self.initializers[name] = array
        return name


def conv(net: NetBuilder, x: str, draw) -> str:
    """A convolution with anything that ONNX allows, perhaps batch norm and an activation behind it."""
    channels, *size = net.shapes[x]
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    out = groups * draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    pads = [draw(st.integers(0, 2)) for _ in range(4)]
    strides, dilations = ([draw(st.integers(1, 2)), draw(st.integers(1, 2))] for _ in range(2))
    padded = [size[i] + pads[i] + pads[i + 2] for i in (0, 1)]
    dilations = [d if (k - 1) * d < p else 1 for d, k, p in zip(dilations, kernel, padded, strict=True)]
    kernel = [k if (k - 1) * d < p else 1 for d, k, p in zip(dilations, kernel, padded, strict=True)]
    shape = [
        (p - (k - 1) * d - 1) // s + 1 for p, k, d, s in zip(padded, kernel, dilations, strides, strict=True)
    ]
    inputs = [x, net.weight(out, channels // groups, *kernel)]
    if draw(st.booleans()):
        inputs.append(net.weight(out))
    attributes = {"pads": pads, "strides": strides, "dilations": dilations, "group": groups}
    y = net.emit("Conv", inputs, (out, *shape), **attributes)
    if draw(st.booleans()):
        tensors = [net.weight(out) for _ in range(3)]
        variance = net.weight(out)
        net.initializers[variance] = np.abs(net.initializers[variance]) + np.float32(0.1)
        y = net.emit("BatchNormalization", [y, *tensors, variance], net.shapes[y])
    return activation(net, y, draw)


def activation(net: NetBuilder, x: str, draw) -> str:
    """Nothing, a clamp, or a function that becomes a table."""
    kind = draw(st.sampled_from(["", "Relu", "Clip", "HardSwish", "Sigmoid", "HardSigmoid", "SiLU", "Tanh"]))
    if not kind:
        return x
    if kind == "Clip":
        net.initializers |= {"zero": np.array(0, np.float32), "six": np.array(1.5, np.float32)}
        return net.emit("Clip", [x, "zero", "six"], net.shapes[x])
    if kind == "SiLU":
        return net.emit("Mul", [x, net.emit("Sigmoid", [x], net.shapes[x])], net.shapes[x])
    return net.emit(kind, [x], net.shapes[x])


def residual(net: NetBuilder, x: str, draw) -> str:
    """A sum of an activation and a branch."""
    channels = net.shapes[x][0]
    branch = net.emit("Conv", [x, net.weight(channels, channels, 1, 1)], net.shapes[x])
    return activation(net, net.emit("Add", [x, branch], net.shapes[x]), draw)


def squeeze_excite(net: NetBuilder, x: str, draw) -> str:
    """A product with one number a channel."""
    channels = net.shapes[x][0]
    mean = net.emit("GlobalAveragePool", [x], (channels, 1, 1))
    gate = net.emit("Conv", [mean, net.weight(channels, channels, 1, 1)], (channels, 1, 1))
    return net.emit("Mul", [x, net.emit("HardSigmoid", [gate], (channels, 1, 1))], net.shapes[x])


def concat(net: NetBuilder, x: str, draw) -> str:
    """An activation beside another of the same size."""
    channels, *size = net.shapes[x]
    branch = activation(net, net.emit("Conv", [x, net.weight(2, channels, 1, 1)], (2, *size)), draw)
    return net.emit("Concat", [branch, x], (channels + 2, *size), axis=1)


def pool(net: NetBuilder, x: str, draw) -> str:
    """A max or average pool with padding on any side."""
    channels, *size = net.shapes[x]
    kernel = [min(draw(st.integers(1, 3)), n) for n in size]
    pads = [draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4)]
    strides = [draw(st.integers(1, 2)) for _ in range(2)]
    shape = [(size[i] + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i in (0, 1)]
    attributes = {"kernel_shape": kernel, "pads": pads, "strides": strides}
    if draw(st.booleans()):
        return net.emit("MaxPool", [x], (channels, *shape), **attributes)
    counts = draw(st.integers(0, 1))
    return net.emit("AveragePool", [x], (channels, *shape), count_include_pad=counts, **attributes)


def pad(net: NetBuilder, x: str, draw) -> str:
    """Zeros on any side of the image."""
    channels, height, width = net.shapes[x]
    top, left, bottom, right = (draw(st.integers(0, 2)) for _ in range(4))
    name = f"pads{len(net.nodes)}"
    net.initializers[name] = np.array([0, 0, top, left, 0, 0, bottom, right])
    return net.emit("Pad", [x, name], (channels, height + top + bottom, width + left + right))


def head(net: NetBuilder, x: str, draw) -> str:
    """Perhaps a mean, then a fully connected layer."""
    if draw(st.booleans()):
        x = net.emit("GlobalAveragePool", [x], (net.shapes[x][0], 1, 1))
    features = int(np.prod(net.shapes[x]))
    flat = net.emit("Flatten", [x], (features,))
    return net.emit("Gemm", [flat, net.weight(5, features), net.weight(5)], (5,), transB=1)


@dataclass(frozen=True)
class Net:
    """A model, a range for each of its activations, its input's shape."""

    model: bytes
    ranges: dict[str, tuple[float, float]]
    shape: tuple[int, ...]


@st.composite
def nets(draw) -> Net:
    """Up to five random blocks, with or without a head."""
    net = NetBuilder(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    net.shapes["x"] = shape
    x = conv(net, "x", draw)
    blocks = [conv, residual, squeeze_excite, concat, pool, pad]
    for block in draw(st.lists(st.sampled_from(blocks), max_size=4)):
        x = block(net, x, draw)
    if draw(st.booleans()):
        x = head(net, x, draw)
    ranges = {}
    for name in net.shapes:
        # Powers of two make ties; narrow ranges saturate; one-sided ones put the zero point at an end.
        width = draw(st.sampled_from([0.25, 1.0, 2.55, 8.0, 3.7]))
        low = draw(st.sampled_from([0.0, -width / 2, -width * 0.3, -width]))
        ranges[name] = (low, low + width)
    graph = helper.make_graph(
        net.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", "others"])],
        [numpy_helper.from_array(array, name) for name, array in net.initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Net(model.SerializeToString(), ranges, shape)
