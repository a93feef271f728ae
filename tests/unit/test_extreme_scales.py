"""Functions with an arithmetic of their own at scales that no network has: limits, or an error in words."""

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, single_layer

from npu_server.numerics.elementwise import CODES
from npu_server.seam import Backend
from npu_wire.errors import InvalidInput

TINY, VAST, OUTPUT = Scale(2.0**-100, 3), Scale(2.0**100, 3), Scale(2.0**-5, 5)
BELOW_ABOVE = np.where(CODES < 3, -128, 127)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("profile", ["tflm", "litert-reference", "litert-xnnpack"])
@pytest.mark.parametrize(
    ("op", "source", "expected"),
    [
        ("Sigmoid", TINY, np.zeros(256)),  # a half, at 1/256 from -128 on
        ("Tanh", TINY, np.zeros(256)),
        ("HardSwish", TINY, np.full(256, 5)),
        ("LeakyRelu", TINY, np.full(256, 5)),
        ("Sigmoid", VAST, BELOW_ABOVE),
        ("Tanh", VAST, BELOW_ABOVE),
    ],
)
def test_limit(profile: str, backend: type[Backend], op: str, source: Scale, expected: np.ndarray) -> None:
    """All codes but that of 0 itself, where an engine's fixed point has no room for it."""
    node = helper.make_node(op, ["x"], ["y"], "node")
    layer = single_layer(profile, [node], (1, 16, 16), {"x": source, "y": OUTPUT})
    codes = layer.run(backend, CODES.reshape(1, 1, 16, 16))["y"].reshape(-1)
    np.testing.assert_array_equal(np.delete(codes, 131), np.delete(expected, 131))


@pytest.mark.parametrize("profile", ["tflm", "litert-xnnpack"])
def test_ratio_without_a_multiplier_names_its_layer(profile: str) -> None:
    """No multiplier holds 2^105: the error says of which layer."""
    node = helper.make_node("LeakyRelu", ["x"], ["y"], "node")
    with pytest.raises(InvalidInput, match=r"layer 'y': scale ratio .* is 2\^30 or more"):
        single_layer(profile, [node], (1, 16, 16), {"x": VAST, "y": OUTPUT})
