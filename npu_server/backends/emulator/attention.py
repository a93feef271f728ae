"""Matrix products of two activations, or of one and a constant that is no layer's weight."""

import numpy as np
import torch

from npu_server.backends.emulator.packing import Packed
from npu_server.backends.emulator.requantize import requantize
from npu_server.execution.pairs import multiply_and_saturate
from npu_server.numerics.rules import AccumulatorRule
from npu_wire.layer_map import INT8_MAX, INT8_MIN

_FLOAT32_INTEGERS = 1 << 24


def multiply_activations(packed: Packed, factors: list[torch.Tensor], rule: AccumulatorRule) -> torch.Tensor:
    """Product over the last axes: int8 (..., M, K) times (..., K, N), logical order in and out.

    float32 holds every partial sum as long as K products of the largest centred codes stay below 2^24 (K up
    to 258 in the worst case); float64 holds all others. A register that may saturate on the way is the
    specification's own loop.
    """
    assert packed.requantizer is not None
    largest = [max(INT8_MAX - zero_point, zero_point - INT8_MIN) for zero_point in packed.zero_points]
    reach = factors[0].shape[-1] * largest[0] * largest[1]
    saturates = rule.where == "every_mac" and reach >= 1 << (rule.bits - 1)
    dtype = torch.int64 if saturates else torch.float32 if reach < _FLOAT32_INTEGERS else torch.float64
    left, right = (x.to(dtype) - zero for x, zero in zip(factors, packed.zero_points, strict=True))
    if saturates:
        held = multiply_and_saturate(left.cpu().numpy(), right.cpu().numpy(), rule)
        sums = torch.from_numpy(held.astype(np.float64)).to(left.device)
    else:
        sums = torch.matmul(left, right).contiguous()
    return requantize(sums.reshape(-1, sums.shape[-1]), packed.requantizer).reshape(sums.shape)
