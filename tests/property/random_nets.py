"""Random small networks as ONNX bytes with ranges, drawn by hypothesis."""

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

FUNCTIONS = [
    "Gelu",
    "LeakyRelu",
    "Elu",
    "Softplus",
    "Mish",
    "Erf",
    "Exp",
    "Sqrt",
    "Reciprocal",
    "Log",
    "Selu",
]


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

    def constant(self, array: np.ndarray) -> str:
        """Adds an initializer that is no weight."""
        name = f"c{len(self.initializers)}"
        self.initializers[name] = array
        return name

    def weight(self, *shape: int) -> str:
        """Adds a random initializer; now and then a channel is dead, of one number, or of tiny ones."""
        array = self.rng.normal(0, 0.4, shape).astype(np.float32)
        if self.rng.random() < 0.2:
            array[0] = self.rng.choice([0, 0.3])
        if self.rng.random() < 0.1:
            array[-1] *= np.float32(2.0**-14)
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
    kinds = ["", "Relu", "Clip", "HardSwish", "Sigmoid", "HardSigmoid", "SiLU", "Tanh", "PRelu", *FUNCTIONS]
    kind = draw(st.sampled_from(kinds))
    if not kind:
        return x
    if kind == "Clip":
        net.initializers |= {"zero": np.array(0, np.float32), "six": np.array(1.5, np.float32)}
        return net.emit("Clip", [x, "zero", "six"], net.shapes[x])
    if kind == "PRelu":
        return net.emit("PRelu", [x, net.weight(net.shapes[x][0], 1, 1)], net.shapes[x])
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
    """An activation beside one to three others, along any axis."""
    shape, axis = list(net.shapes[x]), draw(st.integers(1, 3))
    parts = [x]
    for _ in range(draw(st.integers(1, 3))):
        out = 2 if axis == 1 else shape[0]
        branch = net.emit("Conv", [x, net.weight(out, shape[0], 1, 1)], (out, *shape[1:]))
        parts.insert(draw(st.integers(0, 1)), activation(net, branch, draw))
    joined = [sum(net.shapes[p][i] for p in parts) if i == axis - 1 else n for i, n in enumerate(shape)]
    return net.emit("Concat", parts, tuple(joined), axis=axis)


def half(net: NetBuilder, x: str, draw) -> str:
    """One half of the channels; nobody reads the other."""
    channels, *size = net.shapes[x]
    wide = net.emit("Conv", [x, net.weight(4, channels, 1, 1)], (4, *size))
    names = [f"{wide}_first", f"{wide}_second"]
    net.nodes.append(helper.make_node("Split", [wide], names, f"{wide}_split", axis=1, num_outputs=2))
    net.shapes |= dict.fromkeys(names, (2, *size))
    return draw(st.sampled_from(names))


def pool(net: NetBuilder, x: str, draw) -> str:
    """A max or average pool with padding on any side, windows over the edge, holes in a max pool's."""
    channels, *size = net.shapes[x]
    kernel = [min(draw(st.integers(1, 3)), n) for n in size]
    pads = [draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4)]
    strides = [draw(st.integers(1, 3)) for _ in range(2)]
    largest, ceiling = draw(st.booleans()), draw(st.integers(0, 1))
    padded = [size[i] + pads[i] + pads[i + 2] for i in (0, 1)]
    dilations = [
        draw(st.integers(1, 2)) if largest and (k - 1) * 2 < p else 1
        for k, p in zip(kernel, padded, strict=True)
    ]
    shape = []
    for i in (0, 1):
        left = padded[i] - (kernel[i] - 1) * dilations[i] - 1
        steps = -(-left // strides[i]) if ceiling else left // strides[i]
        # No window begins in the padding behind the image.
        steps -= int(ceiling and steps * strides[i] >= size[i] + pads[i])
        shape.append(steps + 1)
    attributes = {"kernel_shape": kernel, "pads": pads, "strides": strides, "ceil_mode": ceiling}
    if largest:
        return net.emit("MaxPool", [x], (channels, *shape), dilations=dilations, **attributes)
    counts = draw(st.integers(0, 1))
    return net.emit("AveragePool", [x], (channels, *shape), count_include_pad=counts, **attributes)


def pad(net: NetBuilder, x: str, draw) -> str:
    """Zeros on any side of the image."""
    channels, height, width = net.shapes[x]
    top, left, bottom, right = (draw(st.integers(0, 2)) for _ in range(4))
    name = f"pads{len(net.nodes)}"
    net.initializers[name] = np.array([0, 0, top, left, 0, 0, bottom, right])
    return net.emit("Pad", [x, name], (channels, height + top + bottom, width + left + right))


def transposed_conv(net: NetBuilder, x: str, draw) -> str:
    """A transposed convolution with anything that ONNX allows."""
    channels, *size = net.shapes[x]
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    out = groups * draw(st.integers(1, 2))
    kernel, strides, dilations = ([draw(st.integers(1, 3)) for _ in range(2)] for _ in range(3))
    extra = [draw(st.integers(0, s - 1)) for s in strides]
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    full = [(n - 1) * s + 1 + r + e for n, s, r, e in zip(size, strides, reach, extra, strict=True)]
    pads = [draw(st.integers(0, min(2, (full[i % 2] - 1) // 2))) for i in range(4)]
    shape = [full[i] - pads[i] - pads[i + 2] for i in (0, 1)]
    inputs = [x, net.weight(channels, out // groups, *kernel), net.weight(out)]
    attributes = {"pads": pads, "strides": strides, "dilations": dilations, "group": groups}
    return net.emit("ConvTranspose", inputs, (out, *shape), output_padding=extra, **attributes)


def resize(net: NetBuilder, x: str, draw) -> str:
    """Nearest or bilinear, to any size."""
    channels, *size = net.shapes[x]
    target = [draw(st.integers(1, 2 * n)) for n in size]
    sizes = net.constant(np.array([channels, *target]))
    mode = draw(st.sampled_from(["nearest", "linear"]))
    where = draw(st.sampled_from(["half_pixel", "asymmetric", "align_corners"]))
    rounding = draw(st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]))
    attributes = {"mode": mode, "coordinate_transformation_mode": where, "nearest_mode": rounding}
    return net.emit("Resize", [x, "", "", sizes], (channels, *target), axes=[1, 2, 3], **attributes)


def slices(net: NetBuilder, x: str, draw) -> str:
    """Every other or a mirrored column, then both halves in another order, or a transposition."""
    channels, height, width = net.shapes[x]
    step = draw(st.sampled_from([2, -1]))
    ends = (0, 2**31) if step > 0 else (-1, -(2**63) + 1)
    bounds = [net.constant(np.array([n])) for n in (*ends, 3, step)]
    width = -(-width // abs(step))
    x = net.emit("Slice", [x, *bounds], (channels, height, width))
    if draw(st.booleans()):
        return net.emit("Transpose", [x], (width, channels, height), perm=[0, 3, 1, 2])
    picked = net.constant(np.array([draw(st.integers(0, channels - 1)) for _ in range(3)]))
    return net.emit("Gather", [x, picked], (3, height, width), axis=1)


def combination(net: NetBuilder, x: str, draw) -> str:
    """A sum, difference, product with a constant of any shape that broadcasts, or with a reduction."""
    shape = net.shapes[x]
    op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
    if draw(st.booleans()):
        reduction = draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum"]))
        axis = draw(st.integers(1, 3))
        small = tuple(1 if i == axis else n for i, n in enumerate(shape, 1))
        other = net.emit(reduction, [x, net.constant(np.array([axis]))], small)
    else:
        other = net.weight(1, *(n if draw(st.booleans()) else 1 for n in shape))
        net.initializers[other][net.initializers[other] == 0] = 0.5
    inputs = [x, other] if op == "Div" or draw(st.booleans()) else [other, x]
    return net.emit(op, inputs, shape)


def attention(net: NetBuilder, x: str, draw) -> str:
    """Tokens with a position embedding and a class token, two heads, everything along torch's detours."""
    channels, height, width = net.shapes[x]
    count = height * width
    tokens = net.emit("Reshape", [x, net.constant(np.array([0, channels, -1]))], (channels, count))
    tokens = net.emit("Transpose", [tokens], (count, channels), perm=[0, 2, 1])
    if draw(st.booleans()):
        tokens = net.emit("Add", [tokens, net.weight(1, count, channels)], (count, channels))
    scale, shift = net.weight(channels), net.weight(channels)
    normal = net.emit("LayerNormalization", [tokens, scale, shift], (count, channels), axis=-1)
    heads = []
    for _ in range(3):
        y = net.emit("MatMul", [normal, net.weight(channels, 4)], (count, 4))
        y = net.emit("Reshape", [y, net.constant(np.array([0, count, 2, 2]))], (count, 2, 2))
        heads.append(net.emit("Transpose", [y], (2, count, 2), perm=[0, 2, 1, 3]))
    query, key, value = heads
    key = net.emit("Transpose", [key], (2, 2, count), perm=[0, 1, 3, 2])
    scores = net.emit("MatMul", [query, key], (2, count, count))
    scores = net.emit("Mul", [scores, net.constant(np.array(0.7, np.float32))], (2, count, count))
    weights = net.emit("Softmax", [scores], (2, count, count), axis=-1)
    y = net.emit("MatMul", [weights, value], (2, count, 2))
    y = net.emit("Transpose", [y], (2, 2, count), perm=[0, 1, 3, 2])
    return net.emit("Reshape", [y, net.constant(np.array([0, 4, height, width]))], (4, height, width))


def sequence(net: NetBuilder, x: str, draw) -> str:
    """An image as a sequence, convolved and pooled along its length, and back."""
    channels, height, width = net.shapes[x]
    length = height * width
    y = net.emit("Reshape", [x, net.constant(np.array([0, channels, -1]))], (channels, length))
    y = net.emit("Conv", [y, net.weight(3, channels, 3), net.weight(3)], (3, length), pads=[1, 1])
    y = net.emit("LeakyRelu", [y], (3, length), alpha=0.1)
    y = net.emit("MaxPool", [y], (3, length), kernel_shape=[3], pads=[1, 1])
    y = net.emit("ConvTranspose", [y, net.weight(3, 2, 2)], (2, 2 * length), strides=[2])
    y = net.emit("AveragePool", [y], (2, length), kernel_shape=[2], strides=[2])
    return net.emit("Reshape", [y, net.constant(np.array([0, 2, height, width]))], (2, height, width))


def depth_and_space(net: NetBuilder, x: str, draw) -> str:
    """Channels become pixels and pixels channels again."""
    channels, height, width = net.shapes[x]
    x = net.emit("Conv", [x, net.weight(8, channels, 1, 1)], (8, height, width))
    mode = draw(st.sampled_from(["CRD", "DCR"]))
    x = net.emit("DepthToSpace", [x], (2, 2 * height, 2 * width), blocksize=2, mode=mode)
    return x if draw(st.booleans()) else net.emit("SpaceToDepth", [x], (8, height, width), blocksize=2)


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
    blocks = [conv, residual, squeeze_excite, concat, pool, pad, transposed_conv, resize, slices]
    blocks += [combination, attention, sequence, depth_and_space, activation, half]
    for block in draw(st.lists(st.sampled_from(blocks), max_size=4)):
        x = block(net, x, draw)
    if draw(st.booleans()):
        x = head(net, x, draw)
    ranges = {}
    for name in net.shapes:
        # Powers of two make ties; narrow ranges saturate; one-sided ones put the zero point at an end.
        width = draw(st.sampled_from([0.25, 1.0, 2.55, 8.0, 3.7, 2.0**-9, 300.0]))
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
