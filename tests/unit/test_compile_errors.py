"""What the compiler refuses, and that it says which node and why."""

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import (
    InvalidInput,
    InvalidModel,
    NonFiniteInput,
    NotCalibrated,
    NpuError,
    UnsupportedModel,
)

BACKEND = ReferenceBackend(BackendOptions(profile="tflm"))
RANGES = {"x": (-1.0, 1.0), "y": (-1.0, 1.0), "c": (-1.0, 1.0)}


def model(nodes, weights=None, shape=("batch", 3, 8, 8), opset: int = 20, inputs=("x",)) -> onnx.ModelProto:
    """A model from "x" to "y"."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "others"])],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def conv(**attributes) -> onnx.NodeProto:
    """A convolution."""
    return helper.make_node("Conv", ["x", "w"], ["y"], "the_conv", **attributes)


WEIGHT = {"w": np.ones((4, 3, 3, 3), np.float32)}


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (
            model([helper.make_node("Hardmax", ["x"], ["y"], "n")]),
            r"node 'n' \(Hardmax\): the NPU has no such operator\. .* a model needs an operator that it has",
        ),
        (
            model([helper.make_node("Conv", ["x", "x"], ["y"], "n")]),
            r"node 'n' \(Conv\): the weight must be constant",
        ),
        (
            model([conv(group=2)], WEIGHT),
            r"node 'the_conv' \(Conv\): weight of shape \(4, 3, 3, 3\) does not fit 3",
        ),
        (model([conv(strides=[0, 1])], WEIGHT), r"strides \(0, 1\) must be two numbers"),
        (model([conv(dilations=[9, 9])], WEIGHT), r"window of 19 does not fit 8"),
        (model([conv(pads=[-1, 0, 0, 0])], WEIGHT), r"pads \(-1, 0, 0, 0\)"),
        (model([conv()], WEIGHT, shape=("batch", 3, "height", 8)), "only the batch may be dynamic"),
        (model([conv()], WEIGHT, opset=12), "opset 12; this NPU takes 13"),
        (model([helper.make_node("Identity", ["x"], ["y"], "n")]), "output 'y' is computed by no layer"),
        (
            model([helper.make_node("Reshape", ["x", "s"], ["y"], "n")], {"s": np.array([3, -1])}),
            r"node 'n' \(Reshape\): target shape \(3, 128\) .* tears the batch apart",
        ),
        (
            model([helper.make_node("ReduceMean", ["x", "a"], ["y"], "n")], {"a": np.array([0])}),
            r"node 'n' \(ReduceMean\): the NPU does nothing across the batch",
        ),
        (
            model([helper.make_node("Add", ["x", "a"], ["y"], "n")], {"a": np.ones((5, 8), np.float32)}),
            r"node 'n' \(Add\): constant of shape \(5, 8\) does not broadcast",
        ),
        (
            model([helper.make_node("CastLike", ["x", "a"], ["y"], "n")], {"a": np.array(1)}),
            r"node 'n' \(CastLike\): the NPU has no other activations than quantized float32",
        ),
        (
            model(
                [
                    helper.make_node("Greater", ["x", "a"], ["c"], "greater"),
                    helper.make_node("CastLike", ["x", "c"], ["y"], "n"),
                ],
                {"a": np.array(1, np.float32)},
            ),
            r"node 'n' \(CastLike\): the NPU has no other activations than quantized float32",
        ),
        *(
            (
                model(
                    [
                        helper.make_node(
                            "Resize",
                            ["x", "", "", "s"],
                            ["y"],
                            "n",
                            mode=mode,
                            coordinate_transformation_mode="pytorch_half_pixel",
                        )
                    ],
                    {"s": np.array([1, 3, 1, 16])},
                ),
                r"node 'n' \(Resize\): 8 to 1 by 'pytorch_half_pixel': ONNX takes the first, torch",
            )
            for mode in ("linear", "nearest")
        ),
        (
            model(
                [
                    helper.make_node("ConstantOfShape", ["s"], ["w"], "huge"),
                    helper.make_node("Conv", ["x", "w"], ["y"], "n"),
                ],
                {"s": np.array([1 << 20, 1 << 20])},
            ),
            "node 'huge' .* constant of 1099511627776 elements",
        ),
        (
            model(
                [
                    helper.make_node("Expand", ["one", "s"], ["w"], "huge"),
                    helper.make_node("Conv", ["x", "w"], ["y"], "n"),
                ],
                {"one": np.ones(1, np.float32), "s": np.array([1 << 40])},
            ),
            "node 'huge'",
        ),
    ],
)
def test_unsupported_model_names_node_and_reason(proto: onnx.ModelProto, message: str) -> None:
    """A sound model that the NPU cannot run is refused with node, operator and reason."""
    with pytest.raises(UnsupportedModel, match=message):
        BACKEND.compile(proto.SerializeToString(), RANGES)


def test_external_data_is_refused(tmp_path) -> None:
    """A tensor outside of the model is never looked for, in initializers or constants."""
    proto = model([conv()], WEIGHT)
    onnx.external_data_helper.set_external_data(proto.graph.initializer[0], location="secret.bin")
    with pytest.raises(InvalidModel, match="'w' is stored outside the model"):
        BACKEND.compile(proto.SerializeToString(), RANGES)
    proto = model(
        [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT["w"], "v")), conv()]
    )
    onnx.external_data_helper.set_external_data(proto.graph.node[0].attribute[0].t, location="secret.bin")
    with pytest.raises(InvalidModel, match="stored outside the model"):
        BACKEND.compile(proto.SerializeToString(), RANGES)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a model",
        model([conv()], WEIGHT).SerializeToString()[:-40],
        model(
            [helper.make_node("Relu", ["y2"], ["y"]), helper.make_node("Relu", ["y"], ["y2"])]
        ).SerializeToString(),
        model([helper.make_node("NoSuchThing", ["x"], ["y"])]).SerializeToString(),
    ],
    ids=["empty", "text", "truncated", "cycle", "unknown operator"],
)
def test_bytes_that_are_no_model(data: bytes) -> None:
    """Broken bytes, cycles and operators that ONNX does not know are invalid models."""
    with pytest.raises(InvalidModel):
        BACKEND.compile(data, RANGES)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_crash(data: st.DataObject) -> None:
    """Whatever bytes are changed, the answer is a program or one of our errors."""
    sound = bytearray(model([conv(pads=[1, 1, 1, 1])], WEIGHT).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(NpuError):
        BACKEND.compile(bytes(sound), RANGES)


@pytest.mark.parametrize(
    ("ranges", "error", "message"),
    [
        ({"x": (-1.0, 1.0)}, NotCalibrated, "'y'"),
        ({"y": (-1.0, 1.0)}, NotCalibrated, "'x'"),
        ({"x": (-1.0, 1.0), "y": (2.0, 2.0)}, InvalidInput, "'y' has no width"),
        ({"x": (-1.0, 1.0), "y": (2.0, -2.0)}, InvalidInput, "'y' has no width"),
        ({"x": (float("nan"), 1.0), "y": (0.0, 1.0)}, InvalidInput, "'x' is not finite"),
        ({"x": (-1.0, float("inf")), "y": (0.0, 1.0)}, InvalidInput, "'x' is not finite"),
        ({"x": (0.0, 1e-40), "y": (0.0, 1.0)}, InvalidInput, "'x'.*too narrow or too wide"),
    ],
)
def test_ranges_are_checked(ranges, error: type[NpuError], message: str) -> None:
    """A missing, empty or infinite range names its activation."""
    with pytest.raises(error, match=message):
        BACKEND.compile(model([conv()], WEIGHT).SerializeToString(), ranges)


def test_weights_are_checked_and_change_nothing_when_refused() -> None:
    """Unknown names, other shapes and NaN are refused as a whole; the program stays as it was."""
    program = BACKEND.compile(model([conv()], WEIGHT).SerializeToString(), RANGES)
    batch = np.random.default_rng(0).integers(-128, 128, (2, 3, 8, 8)).astype(np.int8)
    before = list(program.forward(program.layer_map.named(batch), ()))[-1].data
    nan = WEIGHT["w"].copy()
    nan[0] = np.nan
    with pytest.raises(InvalidInput, match="'v': no layer"):
        program.load_weights({"w": WEIGHT["w"] * 2, "v": WEIGHT["w"]})
    with pytest.raises(InvalidInput, match=r"'w': float32 of shape \(3,\)"):
        program.load_weights({"w": np.ones(3, np.float32)})
    with pytest.raises(NonFiniteInput, match="'w' hold NaN"):
        program.load_weights({"w": nan})
    np.testing.assert_array_equal(list(program.forward(program.layer_map.named(batch), ()))[-1].data, before)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (257, 3, 8, 8), (2, 3, 8, 7), (3, 8, 8)])
def test_batch_is_checked(shape: tuple[int, ...]) -> None:
    """Empty, too large and misshapen batches are refused before anything is computed."""
    program = BACKEND.compile(model([conv()], WEIGHT).SerializeToString(), RANGES)
    with pytest.raises(InvalidInput, match=r"input .x. is int8 of shape|this NPU takes 1 to 256"):
        program.forward(program.layer_map.named(np.zeros(shape, np.int8)), ())
