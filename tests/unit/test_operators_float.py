"""Single operators against ONNX Runtime's float kernels, within what quantizing the output may cost."""

from importlib import resources

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import Backend, BackendOptions
from npu_wire.errors import UnsupportedModel
from npu_wire.layer_map import LayerMap

RNG = np.random.default_rng(7)
INPUT = (-4.0, 3.97)
HALF_LSB = 0.5001
FIXED_POINT_LSB = 1.0  # TFLM computes these in fixed point, not by tables; the judges hold it to the bit

Case = tuple[str, list, tuple[int, ...], dict[str, np.ndarray], float]


def node(op: str, *inputs: str, **attributes) -> list:
    """A single operator from "x" to "y"."""
    return [helper.make_node(op, ["x", *inputs], ["y"], "the_node", **attributes)]


def numbers(*shape: int) -> np.ndarray:
    """A float32 constant."""
    return RNG.normal(0, 1, shape).astype(np.float32)


def integers(*values: int) -> np.ndarray:
    """An int64 constant."""
    return np.array(values, np.int64)


ASYMMETRIC = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
MOVES: list[Case] = [
    ("transpose", node("Transpose", perm=[0, 3, 1, 2]), (4, 5, 6), {}, 0),
    ("channels", node("Gather", "i", axis=1), (4, 5, 6), {"i": integers(3, 0, 0)}, 0),
    ("one channel", node("Gather", "i", axis=-3), (4, 5, 6), {"i": np.array(-1)}, 0),
    ("token", node("Gather", "i", axis=1), (7, 6), {"i": np.array(0)}, 0),
    (
        "slice",
        node("Slice", "s", "e", "a", "t"),
        (4, 5, 6),
        {"s": integers(1, -1), "e": integers(9, -(2**40)), "a": integers(2, -1), "t": integers(2, -2)},
        0,
    ),
    ("edge", node("Pad", "p", mode="edge"), (2, 3, 4), {"p": integers(0, 1, 2, 0, 0, 0, 1, 3)}, 0),
    ("reflect", node("Pad", "p", mode="reflect"), (2, 3, 4), {"p": integers(0, 1, 2, 0, 0, 0, 1, 3)}, 0),
    ("zeros", node("Pad", "p"), (3, 4), {"p": integers(0, 2, 0, 0, 1, 3)}, 0),
    ("depth", node("DepthToSpace", blocksize=2), (8, 2, 3), {}, 0),
    ("depth crd", node("DepthToSpace", blocksize=2, mode="CRD"), (8, 2, 3), {}, 0),
    ("space", node("SpaceToDepth", blocksize=2), (3, 4, 6), {}, 0),
    ("tile", node("Tile", "r"), (3, 4), {"r": integers(1, 2, 3)}, 0),
    ("expand", node("Expand", "s"), (3, 1), {"s": integers(1, 3, 5)}, 0),
    ("largest", node("ReduceMax", "a", keepdims=0), (3, 4, 5), {"a": integers(1, 3)}, 0),
    ("smallest", node("ReduceMin", "a", keepdims=0), (3, 4, 5), {"a": integers(1, 3)}, 0),
    ("global max", node("GlobalMaxPool"), (3, 4, 5), {}, 0),
    ("flatten", node("Flatten"), (3, 4, 5), {}, 0),
    ("a table of tokens", node("Gather", "i", axis=1), (7, 6), {"i": integers(3, 0, 0, 6).reshape(2, 2)}, 0),
    (
        "nearest",
        node("Resize", "", "", "z", axes=[2, 3], **ASYMMETRIC),
        (2, 3, 5),
        {"z": integers(7, 4)},
        0,
    ),
]
FIXED_POINT = ("HardSwish", "Sigmoid", "Tanh")
PLAIN = ("Gelu", "Tanh", "Sigmoid", "Erf", "Elu", "Selu", "Softplus", "Softsign", "Mish", "HardSwish", "Exp")
PLAIN += ("Abs", "Neg", "Celu", "HardSigmoid", "Sin", "Cos")
FUNCTIONS: list[Case] = [
    *(
        (op.lower(), node(op), (3, 40), {}, FIXED_POINT_LSB if op in FIXED_POINT else HALF_LSB)
        for op in PLAIN
    ),
    ("gelu tanh", node("Gelu", approximate="tanh"), (3, 40), {}, HALF_LSB),
    ("leaky", node("LeakyRelu", alpha=0.2), (3, 40), {}, FIXED_POINT_LSB),
    ("prelu", node("PRelu", "s"), (3, 4, 5), {"s": numbers(3, 1, 1)}, HALF_LSB),
    (
        "cube",
        [helper.make_node("Constant", [], ["p"], value_float=3.0), *node("Pow", "p")],
        (3, 40),
        {},
        HALF_LSB,
    ),
]
NORM = {"s": numbers(8), "b": numbers(8), "m": numbers(4, 5), "c": numbers(3), "d": numbers(3)}
HIDES = {"c": np.triu(np.ones((3, 4)), 1).astype(np.bool_), "low": np.array(-1e30, np.float32)}
HIDDEN = [helper.make_node("Where", ["c", "low", "x"], ["s"], "mask")]
HOST: list[Case] = [
    ("softmax", node("Softmax", axis=-1), (3, 7), {}, HALF_LSB),
    ("softmax of channels", node("Softmax", axis=1), (3, 4, 5), {}, HALF_LSB),
    ("log softmax", node("LogSoftmax", axis=-1), (3, 7), {}, HALF_LSB),
    ("layer norm", node("LayerNormalization", "s", "b"), (3, 8), NORM, HALF_LSB),
    ("layer norm over two", node("LayerNormalization", "m", axis=2), (3, 4, 5), NORM, HALF_LSB),
    ("hidden softmax", [*HIDDEN, helper.make_node("Softmax", ["s"], ["y"])], (3, 4), HIDES, HALF_LSB),
    (
        "softmax beside a bias and a mask, in another shape",
        [
            helper.make_node("Add", ["x", "m"], ["s"]),
            helper.make_node("Reshape", ["s", "h"], ["r"]),
            helper.make_node("Softmax", ["r"], ["y"]),
        ],
        (3, 4),
        {"m": np.where(HIDES["c"], -100, 0.5).astype(np.float32), "h": integers(0, 1, 3, 4)},
        HALF_LSB,
    ),
    ("instance", node("InstanceNormalization", "c", "d"), (3, 4, 5), NORM, HALF_LSB),
]
# Constants and weights are quantized as well, and some rules round twice.
ARITHMETIC: list[Case] = [
    ("mean of channels", node("ReduceMean", "a"), (3, 4, 5), {"a": integers(1)}, 1.01),
    ("mean of tokens", node("ReduceMean", "a", keepdims=0), (3, 4), {"a": integers(1)}, 1.01),
    ("sum", node("ReduceSum", "a", keepdims=0), (3, 4, 5), {"a": integers(1, 2)}, 1.01),
    ("position", node("Add", "c"), (3, 4), {"c": numbers(1, 3, 4)}, 1.6),
    ("less a map", node("Sub", "c"), (3, 4, 5), {"c": numbers(4, 5)}, 1.6),
    ("channels last", node("Mul", "c"), (3, 4), {"c": numbers(4)}, 1.6),
    ("divided", node("Div", "c"), (3, 4), {"c": numbers(4) + np.float32(5)}, 1.6),
    ("constant first", [helper.make_node("Sub", ["c", "x"], ["y"])], (3, 4), {"c": numbers(3, 4)}, 1.6),
    (
        "bilinear",
        node("Resize", "", "", "z", axes=[2, 3], mode="linear"),
        (2, 3, 5),
        {"z": integers(7, 4)},
        1.3,
    ),
    (
        "transposed",
        node("ConvTranspose", "w", "b", strides=[2, 3], pads=[1, 0, 0, 2], output_padding=[1, 0], group=2),
        (4, 3, 4),
        {"w": numbers(4, 3, 3, 3), "b": numbers(6)},
        2.5,
    ),
    ("sequence", node("Conv", "w", pads=[1, 1], strides=[2]), (4, 9), {"w": numbers(3, 4, 3)}, 3.0),
    ("matrix", node("MatMul", "w"), (2, 3, 6), {"w": numbers(6, 5)}, 3.0),
    (
        "class token",
        [
            helper.make_node("Shape", ["x"], ["n"], end=1),
            helper.make_node("Concat", ["n", "one", "four"], ["s"], axis=0),
            helper.make_node("Expand", ["c", "s"], ["token"]),
            helper.make_node("Concat", ["token", "x"], ["y"], axis=1),
        ],
        (3, 4),
        {"c": numbers(1, 1, 4), "one": integers(1), "four": integers(4)},
        1.01,
    ),
    (
        "larger of two",
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
            helper.make_node("Max", ["x", "t"], ["y"]),
        ],
        (5, 5),
        {},
        1.01,
    ),
    ("smallest of three", node("Min", "c", "n"), (3, 1, 5), {"c": numbers(3, 4, 1), "n": numbers(5)}, 1.01),
    (
        "samples in rows of a batch norm",
        [
            helper.make_node("Reshape", ["x", "rows"], ["r"]),
            helper.make_node("BatchNormalization", ["r", "g", "b", "m", "v"], ["n"]),
            helper.make_node("Reshape", ["n", "back"], ["y"]),
        ],
        (3, 4),
        {
            "rows": integers(-1, 4),
            "back": integers(-1, 3, 4),
            "v": np.ones(4, np.float32),
            **{name: numbers(4) for name in "gbm"},
        },
        1.01,
    ),
    (
        "a constant of more dimensions",
        [
            helper.make_node("Add", ["x", "c"], ["a"]),
            helper.make_node("Transpose", ["a"], ["y"], perm=[1, 0, 2, 3]),
        ],
        (3, 4),
        {"c": numbers(2, 1, 3, 4)},
        1.6,
    ),
    (
        "a bias a window, repeated over the batch",
        [
            helper.make_node("Reshape", ["x", "windows"], ["r"]),
            helper.make_node("Shape", ["x"], ["n"], end=1),
            helper.make_node("Concat", ["n", "sizes"], ["s"], axis=0),
            helper.make_node("Expand", ["c", "s"], ["e"]),
            helper.make_node("Reshape", ["e", "windows"], ["w"]),
            helper.make_node("Add", ["r", "w"], ["a"]),
            helper.make_node("Reshape", ["a", "back"], ["y"]),
        ],
        (2, 3, 4),
        {
            "windows": integers(-1, 3, 4),
            "back": integers(-1, 2, 3, 4),
            "sizes": integers(2, 3, 4),
            "c": numbers(1, 2, 3, 4),
        },
        1.6,
    ),
    (
        "a state repeated over the batch, behind a layer",
        [
            helper.make_node("Gemm", ["x", "w"], ["a"]),
            helper.make_node("Shape", ["x"], ["n"], end=1),
            helper.make_node("Concat", ["n", "five"], ["s"], axis=0),
            helper.make_node("Expand", ["c", "s"], ["e"]),
            helper.make_node("Add", ["a", "e"], ["y"]),
        ],
        (6,),
        {"w": numbers(6, 5), "c": numbers(1, 5), "five": integers(5)},
        3.0,
    ),
    ("stretched", node("Mul", "c"), (3, 1, 5), {"c": numbers(3, 4, 1)}, 1.6),
    ("stretched by one a channel", node("Add", "c"), (1, 4, 5), {"c": numbers(3, 1, 1)}, 1.6),
    (
        "constant matrix first",
        [helper.make_node("MatMul", ["w", "x"], ["y"])],
        (6, 4),
        {"w": numbers(5, 6)},
        3.0,
    ),
    (
        "constant matrix first, of images",
        [helper.make_node("MatMul", ["w", "x"], ["y"])],
        (2, 6, 4),
        {"w": numbers(5, 6)},
        3.0,
    ),
    ("a matrix a head", node("MatMul", "w"), (3, 4, 6), {"w": numbers(3, 6, 5)}, 3.5),
    (
        "a matrix a head, first",
        [helper.make_node("MatMul", ["w", "x"], ["y"])],
        (3, 6, 4),
        {"w": numbers(1, 3, 5, 6)},
        3.5,
    ),
]


def model(case: Case) -> bytes:
    """The case's float model."""
    _, nodes, shape, constants, _ = case
    graph = helper.make_graph(
        nodes,
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    bare = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(bare).SerializeToString()


def codes(layer_map: LayerMap, shape: tuple[int, ...]) -> np.ndarray:
    """Random INT8 inputs."""
    return np.random.default_rng(0).integers(-128, 128, (4, *shape)).astype(np.int8)


@pytest.mark.parametrize("backend", [ReferenceBackend, EmulatorBackend])
@pytest.mark.parametrize("case", [*MOVES, *FUNCTIONS, *HOST, *ARITHMETIC], ids=lambda case: case[0])
def test_operator_is_float_up_to_quantization(case: Case, backend: type[Backend]) -> None:
    """ONNX Runtime computes the operator in float32 on the very numbers that the INT8 inputs stand for."""
    name, _, shape, _, bound = case
    data = model(case)
    program = backend(BackendOptions(profile="tflm")).compile(
        data, {"x": INPUT} | dict.fromkeys("yan", (-3.0, 5.0))
    )
    layer_map = program.layer_map
    q = codes(layer_map, shape)
    entry, spec = layer_map.inputs[0], layer_map.tensors[layer_map.outputs[0]]
    x = ((q.astype(np.float64) - entry.zero_point) * entry.scale).astype(np.float32)
    (exact,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    result = list(program.forward(program.layer_map.named(q), ()))[-1].data
    assert result.shape == exact.shape
    steps = np.clip(exact / spec.scale + spec.zero_point, -128, 127)
    assert np.abs(result - steps).max() <= max(bound, 1e-3), name
    assert layer_map.layers[-1].moves_data_only == (bound == 0)
    assert layer_map.layers[-1].host_float == (case in HOST)


@pytest.mark.parametrize("case", [c for c in HOST if len(c[1]) == 1], ids=lambda case: case[0])
def test_host_operators_are_refused_where_the_profile_leaves_them_out(case: Case, tmp_path) -> None:
    """Without [host_float] there is no softmax, and the backend does not claim one."""
    shipped = resources.files("npu_server").joinpath("profiles", "tflm.toml").read_text()
    bare = tmp_path / "bare.toml"
    bare.write_text(shipped.split("[host_float]")[0].replace('"tflm"', '"bare"'))
    backend = ReferenceBackend(BackendOptions(profile=str(bare)))
    op = case[1][0].op_type
    assert op not in backend.open().operators
    with pytest.raises(UnsupportedModel, match=rf"node 'the_node' \({op}\).*host_float.operators"):
        backend.compile(model(case), {"x": INPUT, "y": (-3.0, 5.0)})
