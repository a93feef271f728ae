"""Rules of integer requantization as one multiplication, one nudge and one shift."""

import numpy as np

from npu_server.numerics.requantize import Multiplier
from npu_server.numerics.scales import Int64Array


def fixed_point(multiplier: Multiplier) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Mantissa, shift and nudges so that the rule is (v * mantissa + nudge) >> shift.

    Two roundings fit into one: rounding v * M half up at bit 31 and the rest half away adds 2^30 to v * M,
    then half of what is left, less one unit of bit 31 where v < 0. Where the rest is cut off, only the first
    rounding adds.
    """
    rule = multiplier.rule
    mantissa, shift = multiplier.mantissa, multiplier.shift
    if rule.multiplier == "power_of_two":
        # A negative shift multiplies.
        mantissa, shift = mantissa << np.clip(-shift, 0, 30), np.clip(shift, 0, 62)
    half = (np.int64(1) << shift) >> 1
    if rule.rounding == "floor":
        nudge = np.minimum(half, 1 << 30) if rule.steps == 2 else np.zeros_like(half)
        return mantissa, shift, nudge, nudge
    if rule.multiplier == "power_of_two" or rule.steps == 1:
        lower = np.maximum(half - 1, 0) if rule.rounding == "half_away" else half
        return mantissa, shift, half, lower
    first = np.where(shift > 31, np.int64(1) << 30, 0)
    negative = half - first if rule.rounding == "half_away" else half + first
    return mantissa, shift, half + first, negative
