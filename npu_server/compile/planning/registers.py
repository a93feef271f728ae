"""Whether a layer's registers can overflow, whatever the weights: known when a network is compiled."""

from collections.abc import Sequence

from npu_server.compile.graph import Add, Conv, Gemm, MatMul, Operator, Shape, Sub
from npu_server.compile.planning.work import products
from npu_server.numerics.profile import Profile
from npu_server.numerics.scales import LARGEST_BIAS, LARGEST_WEIGHT, Quantization
from npu_wire.layer_map import INT8_MAX, INT8_MIN

_WITH_ROUNDING = LARGEST_BIAS + 2**10  # the scale that holds a bias is rounded to float32
_ANY_CODE = INT8_MAX - INT8_MIN  # the farthest that a code can lie from a zero point


def never_overflows(
    operator: Operator, sources: Sequence[Quantization], shape: Shape, scale: float, profile: Profile
) -> bool:
    """Whether every sum inside a layer fits where the NPU keeps it, for all weights and inputs.

    Args:
        operator: what the layer does.
        sources: quantization of its inputs, but for raw ones and constants.
        shape: of its first input, without the batch.
        scale: of its output.
        profile: the arithmetic.
    """
    limit = 1 << (profile.accumulator.bits - 1)
    match operator:
        case Conv() | Gemm():
            (source,) = sources
            return products(operator, shape) * LARGEST_WEIGHT * _reach(source) + _WITH_ROUNDING < limit
        case MatMul():
            reach = [_reach(source) for source in sources]
            first, second = reach if len(reach) == 2 else (*reach, _ANY_CODE)
            return products(operator, shape) * first * second < limit
        case Add() | Sub() if profile.add.method == "int8":
            # Each operand is clamped to INT8 in the output's scale before they are added.
            return operator.operand is None and all(_fits(source, scale) for source in sources)
    return True  # tables, averages in registers of their own, the host's floating point


def _reach(source: Quantization) -> int:
    """Largest magnitude of a code minus its zero point."""
    return max(INT8_MAX - source.zero_point, source.zero_point - INT8_MIN)


def _fits(source: Quantization, scale: float) -> bool:
    """Whether every code of a tensor has one at another scale with zero point 0."""
    low, high = INT8_MIN - source.zero_point, INT8_MAX - source.zero_point
    return low * source.scale >= INT8_MIN * scale and high * source.scale <= INT8_MAX * scale
