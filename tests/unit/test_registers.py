"""Which layers' registers can overflow: by hand, and against sums that the reference really adds up."""

import numpy as np
import pytest
from onnx import helper
from single_layers import Scale, single_layer

SCALES = {"x": Scale(1.0, 0), "y": Scale(1.0, 0)}


def _fully_connected(inputs: int, profile: str, zero_point: int = 0) -> bool:
    """What the layer map says of a fully connected layer with weights that are all as large as they get."""
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "fc")
    scales = {"x": Scale(1.0, zero_point), "y": Scale(1.0, 0)}
    weights = {"w": np.ones((inputs, 1), np.float32)}
    return single_layer(profile, [node], (inputs,), scales, weights).layer.spec.never_overflows


@pytest.mark.parametrize(
    ("inputs", "zero_point", "safe"),
    [
        # 127 * 128 an input beside a bias of up to 2^30 and its rounding: (2^30 - 2^10) / 16,256 = 66,051.9
        (66_051, 0, True),
        (66_052, 0, False),
        # 127 * 255 an input where real 0 is the lowest code: (2^30 - 2^10) / 32,385 = 33,155.5
        (33_155, -128, True),
        (33_156, -128, False),
    ],
)
def test_the_bound_of_32_bits_is_met_exactly(inputs: int, zero_point: int, safe: bool) -> None:
    """As many inputs as a register of 32 bits holds together with the largest bias, and one more."""
    assert _fully_connected(inputs, "tflm", zero_point) is safe


@pytest.mark.parametrize("profile", ["acc16", "acc16-wrap", "acc18"])
def test_a_narrow_register_is_never_trusted(profile: str) -> None:
    """Its bias alone can fill it."""
    assert not _fully_connected(1, profile)


def test_products_of_activations_have_no_bias() -> None:
    """Eight products of 128 * 128 are 131,072, one more than 18 bits hold; seven are 114,688."""
    node = helper.make_node("MatMul", ["x", "x"], ["y"], "product")
    assert single_layer("acc18", [node], (7, 7), SCALES).layer.spec.never_overflows
    assert not single_layer("acc18", [node], (8, 8), SCALES).layer.spec.never_overflows


@pytest.mark.parametrize(("scale", "safe"), [(1.0, False), (2.0, True)])
def test_an_addition_of_int8_operands_may_clamp_them(scale: float, safe: bool) -> None:
    """The operands' 127 is 254 at half of their scale, which is clamped, and 127 at their own."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["n"], "negate"),
        helper.make_node("Add", ["x", "n"], ["y"], "add"),
    ]
    weights = {"w": np.full((1, 1, 1, 1), -1, np.float32)}
    scales = {"x": Scale(2.0, 0), "n": Scale(2.0, 0), "y": Scale(scale, 0)}
    assert single_layer("pow2-trunc", nodes, (1, 1, 1), scales, weights).layer.spec.never_overflows is safe
    assert single_layer("tflm", nodes, (1, 1, 1), scales, weights).layer.spec.never_overflows
