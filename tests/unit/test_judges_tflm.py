"""Profile `tflm` against TensorFlow Lite Micro, and LiteRT's reference kernels where the rule is the same."""

from collections.abc import Callable

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from onnx import helper
from single_layers import BACKENDS, Scale, SingleLayer, pair_layer, random_codes, single_layer
from tflite_models import TfliteModel, schema

tflm_runtime = pytest.importorskip("tflite_micro.python.tflite_micro.runtime", reason="no tflite-micro here")

PROFILE = "tflm"
Engine = Callable[[bytes, list[np.ndarray]], np.ndarray]


def tflm(model: bytes, inputs: list[np.ndarray]) -> np.ndarray:
    """TensorFlow Lite Micro's answer."""
    interpreter = tflm_runtime.Interpreter.from_bytes(model, arena_size=1 << 26)
    for index, array in enumerate(inputs):
        interpreter.set_input(array, index)
    interpreter.invoke()
    return interpreter.get_output(0)


def litert_reference(model: bytes, inputs: list[np.ndarray]) -> np.ndarray:
    """The answer of LiteRT's reference kernels."""
    resolver = OpResolverType.BUILTIN_REF
    interpreter = Interpreter(model_content=model, experimental_op_resolver_type=resolver, num_threads=1)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def nhwc(x: np.ndarray) -> np.ndarray:
    """Channels last, where there are images."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def assert_equal(net: SingleLayer, batch: np.ndarray, engine: Engine, model: bytes) -> None:
    """Both backends yield the judge's elements, every one."""
    expected = engine(model, [nhwc(batch)])
    for backend in BACKENDS:
        actual = nhwc(net.run(backend, batch)["y"])
        np.testing.assert_array_equal(actual, expected.reshape(actual.shape))


def quantized(model: TfliteModel, shape: tuple[int, ...], scale: Scale) -> int:
    """Adds an activation."""
    return model.tensor(shape, scale=scale.scale, zero_point=scale.zero_point)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that do not change."""
    return np.random.default_rng(11)


ENGINES = pytest.mark.parametrize("engine", [tflm, litert_reference])
ONLY_TFLM = pytest.mark.parametrize("engine", [tflm])
CONVOLUTIONS = {
    "plain": {"out": 24, "in": 16, "k": 3, "relu": True},
    "strided": {"out": 24, "in": 5, "k": 3, "stride": 2},
    "dilated": {"out": 8, "in": 16, "k": 3, "dilation": 2},
    "pointwise": {"out": 40, "in": 64, "k": 1},
    "depthwise": {"out": 32, "in": 32, "k": 3, "depthwise": True, "relu": True},
    "depthwise strided": {"out": 32, "in": 32, "k": 5, "stride": 2, "depthwise": True},
}


@ONLY_TFLM
@pytest.mark.parametrize("scales", ["any", "power_of_two"])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_convolution(shape: str, scales: str, engine: Engine, rng: np.random.Generator) -> None:
    """Convolutions with per-channel weights and padding SAME agree on every element."""
    given = CONVOLUTIONS[shape]
    out, inner, k, depthwise = given["out"], given["in"], given["k"], given.get("depthwise", False)
    stride, dilation = given.get("stride", 1), given.get("dilation", 1)
    codes = rng.integers(-127, 128, (out, 1 if depthwise else inner, k, k))
    codes[:, 0, 0, 0] = 127
    column = (out, 1, 1, 1)
    steps = (
        2.0 ** -rng.integers(6, 9, column) if scales == "power_of_two" else rng.uniform(0.002, 0.02, column)
    )
    x, y = (
        (Scale(0.0625, -11), Scale(1.0, 6))
        if scales == "power_of_two"
        else (Scale(0.0431, -11), Scale(0.71, 6))
    )
    attributes = {"strides": [stride] * 2, "dilations": [dilation] * 2, "group": out if depthwise else 1}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", auto_pad="SAME_UPPER", **attributes)]
    nodes.append(helper.make_node("Relu" if given.get("relu") else "Identity", ["c"], ["y"], "act"))
    bias = rng.normal(0, 3, out).astype(np.float32)
    weight = (codes * steps).astype(np.float32)
    named = {"x": x, "y": y, "c": y}
    net = single_layer(PROFILE, nodes, (inner, 13, 12), named, {"w": weight, "b": bias})
    last = "y" if given.get("relu") else "c"
    batch = random_codes(rng, 3, inner, 13, 12)
    weights, height, width = net.prepared.weights, -(-13 // stride), -(-12 // stride)
    model = TfliteModel()
    tx, ty = quantized(model, (3, 13, 12, inner), x), quantized(model, (3, height, width, out), y)
    order, axis = ((1, 2, 3, 0), 3) if depthwise else ((0, 2, 3, 1), 0)
    stored = weights.codes.transpose(order)
    tw = model.tensor(stored.shape, scale=weights.scales, axis=axis, data=stored)
    tb = model.tensor((out,), np.int32, weights.scales * np.float32(x.scale), data=weights.bias)
    fields = {
        "padding": schema.Padding.SAME,
        "strideH": stride,
        "strideW": stride,
        "dilationHFactor": dilation,
        "dilationWFactor": dilation,
        "fusedActivationFunction": 1 if given.get("relu") else 0,
    }
    if depthwise:
        model.operator(
            "DEPTHWISE_CONV_2D", [tx, tw, tb], [ty], "DepthwiseConv2DOptions", 3, depthMultiplier=1, **fields
        )
    else:
        model.operator("CONV_2D", [tx, tw, tb], [ty], "Conv2DOptions", 3, **fields)
    expected = engine(model.finish([tx], [ty]), [nhwc(batch)])
    for backend in BACKENDS:
        np.testing.assert_array_equal(nhwc(net.run(backend, batch)[last]), expected)


@ONLY_TFLM
@pytest.mark.parametrize(("sx", "sy", "step"), [(0.043, 0.31, 0.013), (0.0625, 2.0, 0.03125)])
def test_fully_connected(sx: float, sy: float, step: float, engine: Engine, rng: np.random.Generator) -> None:
    """Fully connected layers with per-channel weights agree on every element."""
    codes = rng.integers(-127, 128, (50, 96))
    codes[:, 0] = 127
    x, y = Scale(sx, -128), Scale(sy, 3)
    steps = step * 2.0 ** -rng.integers(0, 2, (50, 1))
    net = single_layer(
        PROFILE,
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)],
        (96,),
        {"x": x, "y": y},
        {"w": (codes * steps).astype(np.float32), "b": rng.normal(0, 3, 50).astype(np.float32)},
    )
    batch, weights = random_codes(rng, 64, 96), net.prepared.weights
    model = TfliteModel()
    tx, ty = quantized(model, (64, 96), x), quantized(model, (64, 50), y)
    tw = model.tensor((50, 96), scale=weights.scales, data=weights.codes)
    tb = model.tensor((50,), np.int32, weights.scales * np.float32(sx), data=weights.bias)
    model.operator("FULLY_CONNECTED", [tx, tw, tb], [ty], "FullyConnectedOptions", 4)
    assert_equal(net, batch, engine, model.finish([tx], [ty]))


PAIR_SCALES = [
    (Scale(0.05, 0), Scale(0.05, 0), Scale(0.1, 0)),
    (Scale(0.1, 3), Scale(0.05, -7), Scale(0.1, 11)),
    (Scale(0.25, 3), Scale(0.125, 4), Scale(0.5, 7)),
    (Scale(0.0432, -128), Scale(0.0311, 5), Scale(0.0781, -9)),
]


@ENGINES
@pytest.mark.parametrize("scales", PAIR_SCALES)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_binary(
    op: str, scales: tuple[Scale, Scale, Scale], engine: Engine, rng: np.random.Generator
) -> None:
    """Sums and products of two tensors agree on every element."""
    net = pair_layer(PROFILE, op, scales, seed=5)
    batch = random_codes(rng, 4, 8, 24, 24)
    model, shape = TfliteModel(), (4, 24, 24, 8)
    a, b, y = (quantized(model, shape, scale) for scale in scales)
    model.operator(op.upper(), [a, b], [y], op + "Options", 2)
    judge = model.finish([a, b], [y])
    for backend in BACKENDS:
        result = net.run(backend, batch)
        expected = engine(judge, [nhwc(result["a"]), nhwc(result["b"])])
        np.testing.assert_array_equal(nhwc(result["y"]), expected)


@ENGINES
@pytest.mark.parametrize("size", [(7, 7), (8, 8), (1, 1), (5, 3)])
@pytest.mark.parametrize(
    "scales",
    [
        (Scale(0.05, -37), Scale(0.05, -37)),
        (Scale(0.0625, -37), Scale(0.03125, 5)),
        (Scale(0.0432, -128), Scale(0.031, -128)),
    ],
)
def test_mean(
    scales: tuple[Scale, Scale], size: tuple[int, int], engine: Engine, rng: np.random.Generator
) -> None:
    """Means over height and width agree on every element."""
    x, y = scales
    node = helper.make_node("GlobalAveragePool", ["x"], ["y"], "mean")
    net = single_layer(PROFILE, [node], (64, *size), {"x": x, "y": y})
    batch = random_codes(rng, 32, 64, *size)
    model = TfliteModel()
    tx, ty = quantized(model, (32, *size, 64), x), quantized(model, (32, 1, 1, 64), y)
    axes = model.tensor((2,), np.int32, data=np.array([1, 2]))
    model.operator("MEAN", [tx, axes], [ty], "ReducerOptions", 2, keepDims=True)
    assert_equal(net, batch, engine, model.finish([tx], [ty]))


@ENGINES
@pytest.mark.parametrize("pool", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_pool(pool: str, kernel: int, stride: int, engine: Engine, rng: np.random.Generator) -> None:
    """Average and max pools with padding SAME agree on every element; the output keeps the input's scale."""
    x = Scale(0.05, -37)
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "auto_pad": "SAME_UPPER"}
    net = single_layer(
        PROFILE,
        [helper.make_node(pool, ["x"], ["y"], "pool", **attributes)],
        (16, 9, 8),
        {"x": x, "y": Scale(1, 0)},
    )
    batch = random_codes(rng, 8, 16, 9, 8)
    model = TfliteModel()
    shape = (8, -(-9 // stride), -(-8 // stride), 16)
    tx, ty = quantized(model, (8, 9, 8, 16), x), quantized(model, shape, x)
    fields = {"filterHeight": kernel, "filterWidth": kernel, "strideH": stride, "strideW": stride}
    name = "AVERAGE_POOL_2D" if pool == "AveragePool" else "MAX_POOL_2D"
    model.operator(name, [tx], [ty], "Pool2DOptions", 2, padding=schema.Padding.SAME, **fields)
    assert_equal(net, batch, engine, model.finish([tx], [ty]))


@ENGINES
def test_requantize(engine: Engine, rng: np.random.Generator) -> None:
    """What brings a Concat's operands to one scale is TFLite's QUANTIZE."""
    scales = (Scale(0.0432, -128), Scale(0.0311, 5), Scale(0.0781, -9))
    net = pair_layer(PROFILE, "Concat", scales, seed=6, axis=1)
    batch, shape = random_codes(rng, 8, 8, 24, 24), (8, 24, 24, 8)
    model = TfliteModel()
    tx, ty = quantized(model, shape, scales[0]), quantized(model, shape, scales[2])
    model.operator("QUANTIZE", [tx], [ty], "QuantizeOptions", 2)
    for backend in BACKENDS:
        result = net.run(backend, batch)
        expected = engine(model.finish([tx], [ty]), [nhwc(result["a"])])
        np.testing.assert_array_equal(nhwc(result["y"])[..., :8], expected)
