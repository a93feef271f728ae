"""The harness notices a wrong rule: throw-away copies of profiles, each with one key changed."""

import re
from importlib import resources

import pytest

from npu_server.numerics.profile import parse_profile

from . import engines
from .matrix import judge_operator

_PROFILES = resources.files("npu_server").joinpath("profiles")
_CONVOLUTION_TO_SINGLE = (
    '[requantize]\nmultiplier = "q31"\nrounding = "half_away"\nsteps = 2',
    '[requantize]\nmultiplier = "q31"\nrounding = "half_up"\nsteps = 1',
)
BROKEN = {
    "ties away from zero become ties up": (
        "tflm",
        "TFLM",
        "convolution",
        ('rounding = "half_away"\nsteps', 'rounding = "half_up"\nsteps'),
    ),
    "two roundings become one": ("tflm", "TFLM", "pointwise convolution", _CONVOLUTION_TO_SINGLE),
    "head room of additions": ("tflm", "TFLM", "add", ("left_shift = 20", "left_shift = 8")),
    "averages round to even": (
        "tflm",
        "TFLM",
        "average pool",
        ('"input_scale"\nrounding = "half_away"', '"input_scale"\nrounding = "half_even"'),
    ),
    "a narrow accumulator": ("tflm", "TFLM", "fully connected", ("bits = 32", "bits = 16")),
    "fully connected as convolutions": (
        "litert-reference",
        "LiteRT reference",
        "fully connected",
        ('[exceptions.fully_connected]\nmultiplier = "float64"\nrounding = "half_away"\nsteps = 1\n', ""),
    ),
    "ties up become ties away": (
        "litert-ruy",
        "LiteRT ruy",
        "convolution",
        (
            '[requantize]\nmultiplier = "q31"\nrounding = "half_up"',
            '[requantize]\nmultiplier = "q31"\nrounding = "half_away"',
        ),
    ),
    "mean without its own offset": (
        "litert-xnnpack",
        "LiteRT XNNPACK",
        "mean",
        ('[mean]\nmethod = "float32_codes"', '[mean]\nmethod = "requantize"'),
    ),
    "zero point after rounding": (
        "onnxruntime",
        "ONNX Runtime",
        "mul",
        ('zero_point = "before_rounding"', 'zero_point = "after_rounding"'),
    ),
    "averages in integers": (
        "onnxruntime",
        "ONNX Runtime",
        "average pool",
        ('[average_pool]\nmethod = "float32_sum"', '[average_pool]\nmethod = "requantize"'),
    ),
    "double rounding for single": (
        "tosa-double",
        "TOSA double rounding",
        "depthwise convolution",
        _CONVOLUTION_TO_SINGLE,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_caught(name: str) -> None:
    """The engine disagrees with the changed copy, and agrees with the profile as it ships."""
    profile, judge, operator, (old, new) = BROKEN[name]
    text = _PROFILES.joinpath(f"{profile}.toml").read_text("utf-8")
    assert len(re.findall(re.escape(old), text)) >= 1
    try:
        engine = engines.find(judge)
    except ImportError as error:
        pytest.skip(f"{judge} is not installed ({error}); make conformance installs it")
    broken = parse_profile(text.replace(old, new, 1), "broken.toml")
    assert judge_operator(operator, broken, engine, 60_000).mismatches > 0
    assert judge_operator(operator, parse_profile(text, profile), engine, 60_000).mismatches == 0
