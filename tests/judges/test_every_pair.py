"""Additions of all pairs of codes: the rare rounding that random tensors miss."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from npu_server.numerics.elementwise import CODES, add
from npu_server.numerics.profile import load_profile
from npu_server.numerics.requantize import Output
from npu_server.numerics.scales import Quantization
from npu_wire.layer_map import Int8Array

A, B = (grid.reshape(-1) for grid in np.meshgrid(CODES, CODES, indexing="ij"))


def engine(scales: list[float], zero_points: list[int]) -> Int8Array:
    """ONNX Runtime's QLinearAdd of every pair; scales and zero points of a, b and the sum."""
    constants = {f"s{i}": np.float32(s) for i, s in enumerate(scales)}
    constants |= {f"z{i}": np.int8(z) for i, z in enumerate(zero_points)}
    names = ["a", "s0", "z0", "b", "s1", "z1", "s2", "z2"]
    node = helper.make_node("QLinearAdd", names, ["y"], domain="com.microsoft")
    a, b, y = (helper.make_tensor_value_info(n, TensorProto.INT8, ["n"]) for n in "aby")
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph([node], "add", [a, b], [y], initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    output: Int8Array = ort.InferenceSession(model.SerializeToString()).run(None, {"a": A, "b": B})[0]
    return output


@pytest.mark.parametrize("seed", range(4))
def test_onnxruntime_adds_every_pair_alike(seed: int) -> None:
    """65,536 pairs at 100 triples of scales and zero points each: no bit differs."""
    profile = load_profile("onnxruntime")
    rng = np.random.default_rng(seed)
    for _ in range(100):
        scales = [float(np.float32(s)) for s in rng.uniform(0.01, 0.1, 3)]
        zero_points = [int(z) for z in rng.integers(-128, 128, 3)]
        qa, qb = (Quantization(s, z) for s, z in zip(scales[:2], zero_points[:2], strict=True))
        ours = add(A, qa, B, qb, scales[2], Output(zero_points[2]), profile)
        np.testing.assert_array_equal(engine(scales, zero_points), ours)


def test_the_sum_that_a_whole_network_found() -> None:
    """19.49999 output steps: ONNX Runtime fuses the zero points' constant too, and rounds down."""
    sums = engine([0.042521894, 0.045601148, 0.051447466], [-121, -122, -117])
    assert sums[(A == -121) & (B == -100)] == -98
