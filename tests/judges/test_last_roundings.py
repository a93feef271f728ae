"""Scales at which the last bit of a table or of an operand decides: a few codes of 256, a pair of 65,536."""

import pytest

from npu_server.numerics.profile import load_profile

from . import engines
from .cases import Scale
from .sweeps import SWEEPS, judge_at

_TFLM, _REFERENCE, _RUY = (
    ("tflm", "TFLM"),
    ("litert-reference", "LiteRT reference"),
    ("litert-ruy", "LiteRT ruy"),
)
_ONNX_RUNTIME = ("onnxruntime", "ONNX Runtime")
_XNNPACK, _TOSA = ("litert-xnnpack", "LiteRT XNNPACK"), ("tosa-double", "TOSA double rounding")

CODES = [
    # Fixed point, not a table: next to zero, two codes differ from the rounded value.
    (*_TFLM, "sigmoid", Scale(2.0**-10, 80)),
    (*_TFLM, "sigmoid", Scale(4.0, 35)),
    (*_TFLM, "tanh", Scale(2.0**-10, 80)),
    (*_TFLM, "tanh", Scale(2.0**-8, 29)),
    # Nearly ties: the C library's float32, whose last bit is not NumPy's.
    (*_REFERENCE, "sigmoid", Scale(0.00033012163476087153, -44)),
    (*_REFERENCE, "sigmoid", Scale(0.03168732300400734, -34)),
    (*_RUY, "sigmoid", Scale(0.0005097219254821539, 51)),
    (*_REFERENCE, "tanh", Scale(0.006053650751709938, -29)),
    (*_RUY, "tanh", Scale(0.01501738466322422, -48)),
    # The function in float64, the rest in float32 with the zero point inside.
    (*_XNNPACK, "sigmoid", Scale(0.003784577129408717, 16)),
    (*_XNNPACK, "sigmoid", Scale(0.00045177715946920216, -104)),
    (*_XNNPACK, "sigmoid", Scale(0.018022479489445686, 22)),
    (*_XNNPACK, "sigmoid", Scale(0.00576060963794589, 108)),
]


@pytest.mark.parametrize(("profile", "judge", "row", "source"), CODES)
def test_every_code(profile: str, judge: str, row: str, source: Scale) -> None:
    """The engine agrees on all 256 codes."""
    (sweep,) = SWEEPS[row]
    assert sweep.output is not None
    cell = judge_at(sweep, {"x": source, "y": sweep.output}, load_profile(profile), engines.find(judge))
    assert (cell.elements, cell.mismatches) == (256, 0)


PAIRS = [
    (*_RUY, "add", (11.5535888671875, -128), (64.88519287109375, 83), (49.10469436645508, 0)),
    (*_RUY, "add", (0.001596248708665371, -1), (0.0005802558152936399, 11), (0.003005259670317173, 0)),
    (*_RUY, "add", (0.002301471773535013, 44), (0.002811300102621317, -128), (0.000594849290791899, 127)),
    (*_TOSA, "add", (0.26232415437698364, 113), (0.15891078114509583, 127), (0.035151924937963486, 0)),
    (*_TOSA, "add", (0.0004951010923832655, 1), (0.0006777778035029769, 1), (0.00033335911575704813, 0)),
    (
        *_TOSA,
        "sub",
        (0.0005648469086736441, -128),
        (0.0004718374402727932, -1),
        (0.0014841908123344183, -119),
    ),
    # A product of three float32 scales, rounded after each step: 41 pairs.
    (
        *_ONNX_RUNTIME,
        "mul",
        (0.03026222437620163, 8),
        (0.09630335867404938, 83),
        (0.1697927862405777, 18),
    ),
    (*_TOSA, "sub", (0.0004716638068202883, 19), (0.0001928598794620484, 1), (4.558700311463326e-05, -128)),
]


@pytest.mark.parametrize(("profile", "judge", "row", "a", "b", "y"), PAIRS)
def test_every_pair(profile: str, judge: str, row: str, a: tuple, b: tuple, y: tuple) -> None:
    """The engine agrees on all 65,536 pairs; what rounds once too often misses one or two, or 41."""
    scales = {name: Scale(*scale) for name, scale in (("a", a), ("b", b), ("y", y))}
    cell = judge_at(SWEEPS[row][0], scales, load_profile(profile), engines.find(judge))
    assert (cell.elements, cell.mismatches) == (65_536, 0)
