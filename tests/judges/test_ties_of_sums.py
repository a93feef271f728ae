"""Sums of which every other one is a tie: a convolution and a fully connected layer that copy their input."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from npu_server.numerics.elementwise import CODES
from npu_server.numerics.profile import list_profiles, load_profile

from . import engines
from .cases import Scale
from .layers import compile_layers
from .matrix import compare

CLAIMS = [(name, judge) for name in list_profiles() for judge in load_profile(name).judged_by]
# Ratios 1/2, 1/4, 3/8 and 1/32 have ties; 7/10 is a little more than that in Q31, and less in float32.
SCALES = [(1.0, 2.0), (1.0, 4.0), (3.0, 8.0), (1.0, 32.0), (7 / 16, 10 / 16), (2.0, 1.0), (1.0, 1.0)]
ZERO_POINTS = [(0, 0), (0, -3), (5, 100)]


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
@pytest.mark.parametrize(("profile", "judge"), CLAIMS)
def test_every_code_times_one_and_three(profile: str, judge: str, op: str) -> None:
    """The engine agrees on 512 sums at each pair of scales: x and 3 * x, with weights whose scale is 1.

    The first input, which makes the weights' scale by its 127, is always real 0.
    """
    try:
        engine = engines.find(judge)
    except ImportError as error:
        pytest.skip(f"{judge} is not installed ({error}); make conformance installs it")
    shape = (2, 16, 16) if op == "Conv" else (2,)
    weight = np.array([[127, 1], [127, 3]], np.float32)
    weight = weight.reshape(2, 2, 1, 1) if op == "Conv" else weight
    fields = {} if op == "Conv" else {"transB": 1}
    node = helper.make_node(op, ["x", "w"], ["y"], "sum", **fields)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *shape]) for n in "xy"]
    graph = helper.make_graph([node], "sums", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    rules = load_profile(profile)
    for scales in SCALES:
        for zero_points in ZERO_POINTS:
            named = zip("xy", scales, zero_points, strict=True)
            ranges = {name: Scale(scale, zero_point).range for name, scale, zero_point in named}
            judged = compile_layers(model.SerializeToString(), ranges, rules)[-1]
            codes = np.stack([np.full(256, zero_points[0], np.int8), CODES])
            batch = codes.reshape(1, *shape) if op == "Conv" else np.ascontiguousarray(codes.T)
            cell = compare(judged, [batch], engine, rules)
            assert (cell.elements, cell.mismatches) == (512, 0), (scales, zero_points)


@pytest.mark.parametrize(("profile", "judge"), CLAIMS)
def test_every_sum_of_a_mean(profile: str, judge: str) -> None:
    """The engine agrees on each sum that 2, 7 or 25 codes can have, at scales where many are ties."""
    rules = load_profile(profile)
    if "mean" in rules.unjudged:
        pytest.skip(f"{profile} claims nothing about mean")
    try:
        engine = engines.find(judge)
    except ImportError as error:
        pytest.skip(f"{judge} is not installed ({error}); make conformance installs it")
    for count, scales in ((2, (1.0, 1.0)), (2, (3.0, 4.0)), (7, (14.0, 12.0)), (25, (10.0, 12.0))):
        node = helper.make_node("GlobalAveragePool", ["x"], ["y"], "mean")
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 1, 1, count]) for n in "xy"]
        graph = helper.make_graph([node], "mean", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        sums = np.arange(-128 * count, 127 * count + 1)
        codes = sums[:, None] // count + (np.arange(count) < sums[:, None] % count)
        for zero_points in ((0, 0), (5, -3), (-1, 100)):
            named = zip("xy", scales, zero_points, strict=True)
            ranges = {name: Scale(scale, zero_point).range for name, scale, zero_point in named}
            judged = compile_layers(model.SerializeToString(), ranges, rules)[-1]
            cell = compare(judged, [codes.astype(np.int8).reshape(-1, 1, 1, count)], engine, rules)
            assert (cell.elements, cell.mismatches) == (len(sums), 0), (count, scales, zero_points)
