"""Functions that engines compute by an arithmetic of their own instead of by a table of real values."""

import numpy as np

from npu_server.numerics import fixed_point
from npu_server.numerics.elementwise import CODES, function_table
from npu_server.numerics.functions import evaluate
from npu_server.numerics.hard_swish import hard_swish_table
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import Output, make_multiplier, requantize, to_int8
from npu_server.numerics.scales import Float64Array, Quantization
from npu_wire.layer_map import Int8Array


def named_table(
    name: str, alpha: float, source: Quantization, scale: float, out: Output, profile: Profile
) -> Int8Array | None:
    """For each code the code of a function that `LutRule` names; shape (256,).

    Args:
        name: of `functions.FUNCTIONS`.
        alpha: of the function.
        source: of the input.
        scale: of the output.
        out: zero point and clamp of the output.
        profile: the arithmetic.

    Returns:
        None where the profile tabulates the function's real values like those of any other.
    """
    rule = profile.lut
    if name == "HardSwish" and rule.hard_swish == "int16":
        return hard_swish_table(source, scale, out)
    if name == "Sigmoid" and rule.sigmoid == "int32":
        return fixed_point.sigmoid_table(source, out)
    if name == "Tanh" and rule.tanh == "int32":
        return fixed_point.tanh_table(source, out)
    if name == "Sigmoid" and rule.sigmoid == "float64":

        def sigmoid(x: Float64Array) -> Float64Array:
            return evaluate("Sigmoid", x.astype(np.float64), 0.0, 0.0)

        return function_table(sigmoid, source, scale, out, profile)
    if name == "LeakyRelu" and rule.leaky_relu != "table":
        return _leaky_relu(alpha, source, scale, out, profile)
    return None


def _leaky_relu(alpha: float, source: Quantization, scale: float, out: Output, profile: Profile) -> Int8Array:
    """`LutRule.leaky_relu`: each side of zero has a factor of its own."""
    centred, rule = CODES.astype(np.int64) - source.zero_point, profile.requantize_in("leaky_relu")
    slope = np.float32(alpha)
    if profile.lut.leaky_relu == "float32_divided":
        with np.errstate(over="ignore", invalid="ignore"):
            real = np.float32(source.scale) * centred.astype(np.float32)
            real = np.where(centred >= 0, real, real * slope) / np.float32(scale)
        real = np.clip(np.nan_to_num(real), -1024, 1024)
        return to_int8(np.rint(real).astype(np.int64), out)
    with np.errstate(over="ignore"):
        ratios = np.array([1, slope], np.float32) * (np.float32(source.scale) / np.float32(scale))
    # XNNPACK takes these ratios only; LiteRT's own kernel computes all others.
    if profile.lut.leaky_relu == "multiplier_8bit" and ((ratios >= 2**-8) & (ratios <= 2**7)).all():
        factors = np.rint(256 * ratios.astype(np.float64)).astype(np.int64)
        return to_int8((centred * np.where(centred >= 0, *factors) + 128) >> 8, out)
    numerators = source.scale, source.scale * float(slope)
    sides = [requantize(centred, make_multiplier(np.array(n), scale, rule), out) for n in numerators]
    return np.where(centred >= 0, *sides)
