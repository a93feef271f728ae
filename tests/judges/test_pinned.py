"""Scales at which a slightly wrong rule shows in a few codes of 256, which random draws rarely meet."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from npu_server.numerics.elementwise import CODES
from npu_server.numerics.profile import load_profile

from . import engines
from .cases import Scale
from .layers import compile_layers, our_outputs
from .matrix import compare
from .tflite_models import TfliteModel

HARD_SWISH = [
    (Scale(0.015570686198771, 17), Scale(0.0077853430993855, -46)),
    (Scale(0.011737914755940437, -34), Scale(0.01995445415377617, -114)),
    (Scale(0.03588347136974335, 27), Scale(0.06100190058350563, 31)),
    (Scale(0.02250012382864952, -48), Scale(0.02250012382864952, 91)),
]
RATIO_OF_7_TO_10 = (Scale(7 / 16, 0), Scale(10 / 16, 0))
PINNED = [
    *(
        (profile, judge, "HardSwish", scales)
        for profile, judge in (("tflm", "TFLM"), ("litert-reference", "LiteRT reference"))
        for scales in HARD_SWISH
    ),
    ("tflm", "TFLM", "Relu", RATIO_OF_7_TO_10),
    ("litert-reference", "LiteRT reference", "Relu", RATIO_OF_7_TO_10),
    ("litert-ruy", "LiteRT ruy", "Relu", RATIO_OF_7_TO_10),
    ("litert-xnnpack", "LiteRT XNNPACK", "Relu", RATIO_OF_7_TO_10),
]


@pytest.mark.parametrize(("profile", "judge", "op", "scales"), PINNED)
def test_every_code_at_pinned_scales(profile: str, judge: str, op: str, scales: tuple[Scale, Scale]) -> None:
    """The engine agrees on all 256 codes.

    Hard swish: three and four of them depend on the nudge of its high product. Relu: 0.7 in Q31 is a little
    more than 0.7, so that TFLM makes 5 * 0.7 a 4; LiteRT divides the scales in float32, which is a little
    less: 3.
    """
    names = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 1, 16, 16]) for n in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], "node")], "layer", names[:1], names[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = {name: scale.range for name, scale in zip("xy", scales, strict=True)}
    rules = load_profile(profile)
    judged = compile_layers(model.SerializeToString(), ranges, rules)[-1]
    try:
        engine = engines.find(judge)
    except ImportError as error:
        pytest.skip(f"{judge} is not installed ({error}); make conformance installs it")
    cell = compare(judged, [CODES.reshape(1, 1, 16, 16)], engine, rules)
    assert (cell.elements, cell.mismatches) == (256, 0)


def test_pool_over_the_whole_image() -> None:
    """ONNX Runtime computes it as a global average: of four codes 4 k + 6 in sum, ties all, half to even.

    The zero point is added after rounding there, and before in any other average pool.
    """
    rules, engine = load_profile("onnxruntime"), engines.find("ONNX Runtime")
    for shape in ((64, 2, 2), (128, 2, 1)):
        node = helper.make_node("AveragePool", ["x"], ["y"], "pool", kernel_shape=shape[1:])
        names = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *shape]) for n in "xy"]
        graph = helper.make_graph([node], "layer", names[:1], names[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        for zero_point in (-128, 0, 1, 127):
            ranges = dict.fromkeys("xy", Scale(0.25, zero_point).range)
            judged = compile_layers(model.SerializeToString(), ranges, rules)[-1]
            cell = compare(judged, [CODES.reshape(1, *shape)], engine, rules)
            assert (cell.elements, cell.mismatches) == (shape[0], 0), (shape, zero_point)


@pytest.mark.parametrize("position", ["half_pixel", "asymmetric"])
@pytest.mark.parametrize(
    ("profile", "judge"),
    [("tflm", "TFLM"), ("litert-reference", "LiteRT reference"), ("litert-ruy", "LiteRT ruy")],
)
def test_bilinear_resize_to_any_size(profile: str, judge: str, position: str) -> None:
    """From 7 x 9 pixels to sizes whose step is no whole 1/1024, smaller ones too."""
    rules, engine = load_profile(profile), engines.find(judge)
    for size in ((3, 5), (8, 6), (11, 13), (20, 31)):
        sizes = numpy_helper.from_array(np.array([1, 4, *size], np.int64), "sizes")
        fields = {"mode": "linear", "coordinate_transformation_mode": position}
        node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], "resize", **fields)
        names = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, 7, 9]) for n in "xy"]
        graph = helper.make_graph([node], "layer", names[:1], names[1:], [sizes])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        judged = compile_layers(model.SerializeToString(), {"x": Scale(0.1, 5).range}, rules)[-1]
        codes = np.random.default_rng(0).integers(-128, 128, (1, 4, 7, 9)).astype(np.int8)
        cell = compare(judged, [codes], engine, rules)
        assert (cell.elements, cell.mismatches) == (4 * size[0] * size[1], 0), size


@pytest.mark.parametrize("scales", [(0.71484375, 0.953125), (1.0, 2.0)])
def test_entries_of_a_table(scales: tuple[float, float]) -> None:
    """LiteRT's ELU: 2 * 0.71484375 over 0.953125 is a tie, times the reciprocal it is a little less.

    Halves of whole numbers are ties either way, and go away from zero. At -17 the function is -0.99999994:
    half of that is no tie, though in float32 it and a half are 1.
    """
    shape, named = (1, 16, 16, 1), [Scale(scale, 0) for scale in scales]
    model = TfliteModel()
    ends = [model.tensor(shape, scale=scale.scale, zero_point=scale.zero_point) for scale in named]
    model.operator("ELU", ends[:1], ends[1:], "", 1)
    (expected,) = engines.find("LiteRT ruy").engine(model.finish(ends[:1], ends[1:]), [CODES.reshape(shape)])
    names = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 1, 16, 16]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Elu", ["x"], ["y"])], "layer", names[:1], names[1:])
    onnx = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = {name: scale.range for name, scale in zip("xy", named, strict=True)}
    profile = load_profile("litert-ruy")
    judged = compile_layers(onnx.SerializeToString(), ranges, profile)[-1]
    for ours in our_outputs(judged, [CODES.reshape(1, 1, 16, 16)], profile):
        np.testing.assert_array_equal(ours.reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize(("scale", "zero_point"), [(0.25, 1), (0.1, 127), (0.07, -5), (0.013, 40)])
def test_average_of_every_pair(scale: float, zero_point: int) -> None:
    """ONNX Runtime's average pool over two pixels, at one scale: every other average of a pair is a tie.

    Each step is rounded to float32, and the zero point is inside of the last one: that decides where it goes.
    """
    rules, engine = load_profile("onnxruntime"), engines.find("ONNX Runtime")
    first, second = np.meshgrid(CODES, CODES, indexing="ij")
    codes = np.stack([first, second, first], axis=-1)[None]
    node = helper.make_node("AveragePool", ["x"], ["y"], "pool", kernel_shape=[1, 2])
    names = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 256, 256, 3]) for n in "xy"]
    graph = helper.make_graph([node], "layer", names[:1], names[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = dict.fromkeys("xy", Scale(scale, zero_point).range)
    judged = compile_layers(model.SerializeToString(), ranges, rules)[-1]
    cell = compare(judged, [codes], engine, rules)
    assert (cell.elements, cell.mismatches) == (2 * 65_536, 0)
