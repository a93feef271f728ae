"""Profile `onnxruntime` against ONNX Runtime's own integer kernels, element by element."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from single_layers import BACKENDS, Scale, SingleLayer, pair_layer, random_codes, single_layer

PROFILE = "onnxruntime"
MICROSOFT = "com.microsoft"
# Powers of two make ties; odd and even zero points tell where the zero point is added.
ADD_SCALES = [
    (Scale(0.05, 0), Scale(0.05, 0), Scale(0.1, 0)),
    (Scale(0.1, 3), Scale(0.05, -7), Scale(0.1, 11)),
    (Scale(0.25, 3), Scale(0.125, 4), Scale(0.5, 7)),
    (Scale(0.25, 3), Scale(0.125, 4), Scale(0.5, 10)),
    (Scale(0.0432, -128), Scale(0.0311, 5), Scale(0.0781, -9)),
]
MUL_SCALES = [
    (Scale(0.05, 3), Scale(0.04, -7), Scale(0.1, 11)),
    (Scale(0.0625, 3), Scale(0.5, -7), Scale(0.25, 11)),
    (Scale(0.0432, -128), Scale(0.0311, 5), Scale(0.0781, -9)),
]
SPATIAL_SCALES = [
    (Scale(0.05, -37), Scale(0.05, -37)),
    (Scale(0.0625, -37), Scale(0.03125, 5)),
    (Scale(0.0625, -37), Scale(0.03125, 4)),
    (Scale(0.0432, -128), Scale(0.031, -128)),
]


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that do not change."""
    return np.random.default_rng(7)


def onnxruntime_result(node, constants: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Runs one integer node."""
    graph = helper.make_graph(
        [node],
        "judge",
        [helper.make_tensor_value_info(n, TensorProto.INT8, a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.INT8, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)[0]


def quantization(**values) -> dict[str, np.ndarray]:
    """Constants `s_NAME` and `z_NAME` of scales."""
    constants = {f"s_{n}": np.array(q.scale, np.float32) for n, q in values.items()}
    return constants | {f"z_{n}": np.array(q.zero_point, np.int8) for n, q in values.items()}


def assert_equal(net: SingleLayer, expected: np.ndarray, batch: np.ndarray) -> None:
    """Both backends yield the judge's elements, every one."""
    for backend in BACKENDS:
        np.testing.assert_array_equal(
            net.run(backend, batch)["y"], expected.reshape(len(batch), *net.layer.shape)
        )


CONVOLUTIONS = {
    "plain": {"out": 24, "in": 16, "k": (3, 3), "pads": [1, 1, 1, 1]},
    "strided": {"out": 24, "in": 16, "k": (3, 3), "pads": [0, 1, 2, 1], "strides": [2, 1]},
    "dilated": {"out": 8, "in": 16, "k": (3, 2), "pads": [2, 1, 2, 0], "dilations": [2, 1]},
    "pointwise": {"out": 40, "in": 64, "k": (1, 1), "pads": [0, 0, 0, 0]},
    "depthwise": {"out": 32, "in": 32, "k": (3, 3), "pads": [1, 1, 1, 1], "group": 32},
    "grouped": {"out": 16, "in": 32, "k": (5, 5), "pads": [2, 2, 2, 2], "group": 4},
}


@pytest.mark.parametrize("scales", ["any", "power_of_two"])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_convolution_equals_qlinearconv(shape: str, scales: str, rng: np.random.Generator) -> None:
    """QLinearConv with per-channel weights agrees on every element."""
    given = CONVOLUTIONS[shape]
    groups = given.get("group", 1)
    codes = rng.integers(-127, 128, (given["out"], given["in"] // groups, *given["k"]))
    codes[:, 0, 0, 0] = 127
    column = (given["out"], 1, 1, 1)
    steps = (
        2.0 ** -rng.integers(6, 9, column) if scales == "power_of_two" else rng.uniform(0.002, 0.02, column)
    )
    sx, sy = (0.0625, 1.0) if scales == "power_of_two" else (0.0431, 0.71)
    weight, bias = (codes * steps).astype(np.float32), rng.normal(0, 3, given["out"]).astype(np.float32)
    keys = ("pads", "strides", "dilations", "group")
    attributes = {k: given[k] for k in keys if k in given}
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", **attributes)
    net = single_layer(
        PROFILE,
        [node],
        (given["in"], 13, 12),
        {"x": Scale(sx, -11), "y": Scale(sy, 6)},
        {"w": weight, "b": bias},
    )
    batch = random_codes(rng, 3, given["in"], 13, 12)
    weights = net.prepared.weights
    constants = quantization(x=net.layer.sources[0], y=Scale(net.layer.scale, 6)) | {
        "w": weights.codes,
        "s_w": weights.scales.astype(np.float32),
        "z_w": np.zeros(given["out"], np.int8),
        "b": weights.bias.astype(np.int32),
    }
    names = ["x", "s_x", "z_x", "w", "s_w", "z_w", "s_y", "z_y", "b"]
    judge = helper.make_node("QLinearConv", names, ["y"], **attributes)
    assert_equal(net, onnxruntime_result(judge, constants, {"x": batch}), batch)


@pytest.mark.parametrize(("sx", "sy", "step"), [(0.043, 0.31, 0.013), (0.0625, 2.0, 0.03125)])
def test_gemm_equals_qgemm(sx: float, sy: float, step: float, rng: np.random.Generator) -> None:
    """QGemm agrees on every element."""
    codes = rng.integers(-127, 128, (50, 96))
    codes[:, 0] = 127
    net = single_layer(
        PROFILE,
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "gemm", transB=1)],
        (96,),
        {"x": Scale(sx, -128), "y": Scale(sy, 3)},
        {"w": (codes * step).astype(np.float32), "b": rng.normal(0, 3, 50).astype(np.float32)},
    )
    batch, weights = random_codes(rng, 64, 96), net.prepared.weights
    constants = quantization(x=net.layer.sources[0], y=Scale(net.layer.scale, 3)) | {
        "w": weights.codes,
        "s_w": weights.scales.astype(np.float32),
        "z_w": np.zeros(50, np.int8),
        "b": weights.bias.astype(np.int32),
    }
    names = ["x", "s_x", "z_x", "w", "s_w", "z_w", "b", "s_y", "z_y"]
    judge = helper.make_node("QGemm", names, ["y"], domain=MICROSOFT, transB=1)
    assert_equal(net, onnxruntime_result(judge, constants, {"x": batch}), batch)


@pytest.mark.parametrize(
    ("op", "scales"),
    [*(("Add", scales) for scales in ADD_SCALES), *(("Mul", scales) for scales in MUL_SCALES)],
)
def test_binary_equals_qlinear_binary(
    op: str, scales: tuple[Scale, Scale, Scale], rng: np.random.Generator
) -> None:
    """QLinearAdd and QLinearMul agree on every element."""
    net = pair_layer(PROFILE, op, scales, seed=3)
    batch = random_codes(rng, 8, 8, 24, 24)
    constants = quantization(**dict(zip("aby", scales, strict=True)))
    names = ["a", "s_a", "z_a", "b", "s_b", "z_b", "s_y", "z_y"]
    judge = helper.make_node(f"QLinear{op}", names, ["y"], domain=MICROSOFT)
    for backend in BACKENDS:
        result = net.run(backend, batch)
        operands = {name: np.ascontiguousarray(result[name]) for name in "ab"}
        np.testing.assert_array_equal(result["y"], onnxruntime_result(judge, constants, operands))


@pytest.mark.parametrize("scales", ADD_SCALES)
def test_concat_equals_qlinear_concat(scales: tuple[Scale, Scale, Scale], rng: np.random.Generator) -> None:
    """QLinearConcat agrees on every element."""
    net = pair_layer(PROFILE, "Concat", scales, seed=4, axis=1)
    batch = random_codes(rng, 8, 8, 24, 24)
    constants = quantization(**dict(zip("aby", scales, strict=True)))
    names = ["s_y", "z_y", "a", "s_a", "z_a", "b", "s_b", "z_b"]
    judge = helper.make_node("QLinearConcat", names, ["y"], domain=MICROSOFT, axis=1)
    for backend in BACKENDS:
        result = net.run(backend, batch)
        operands = {name: np.ascontiguousarray(result[name]) for name in "ab"}
        np.testing.assert_array_equal(result["y"], onnxruntime_result(judge, constants, operands))


POOLS = {
    "GlobalAveragePool": {},
    "AveragePool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    "AveragePool, padded": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 1]},
    "AveragePool, padding counts": {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1},
}


@pytest.mark.parametrize("scales", SPATIAL_SCALES)
@pytest.mark.parametrize("pool", POOLS)
def test_average_equals_qlinear_average(
    pool: str, scales: tuple[Scale, Scale], rng: np.random.Generator
) -> None:
    """QLinearGlobalAveragePool and QLinearAveragePool agree on every element."""
    op = pool.split(",")[0]
    net = single_layer(
        PROFILE,
        [helper.make_node(op, ["x"], ["y"], "pool", **POOLS[pool])],
        (64, 8, 8),
        dict(zip("xy", scales, strict=True)),
    )
    batch = random_codes(rng, 16, 64, 8, 8)
    names = ["x", "s_x", "z_x", "s_y", "z_y"]
    judge = helper.make_node(f"QLinear{op}", names, ["y"], domain=MICROSOFT, channels_last=0, **POOLS[pool])
    constants = quantization(**dict(zip("xy", scales, strict=True)))
    assert_equal(net, onnxruntime_result(judge, constants, {"x": batch}), batch)
