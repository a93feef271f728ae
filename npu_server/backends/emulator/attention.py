"""Matrix products of two activations."""

import torch

from npu_server.backends.emulator.packing import Packed
from npu_server.backends.emulator.requantize import requantize
from npu_server.compile.lowering import Layer
from npu_wire.layer_map import INT8_MAX, INT8_MIN

_FLOAT32_INTEGERS = 1 << 24


def multiply_activations(layer: Layer, packed: Packed, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product over the last axes: int8 (..., M, K) times (..., K, N), logical order in and out.

    float32 holds every partial sum as long as K products of the largest centred codes stay below 2^24 (K up
    to 258 in the worst case); float64 holds all others.
    """
    assert packed.requantizer is not None
    reach = [max(INT8_MAX - q.zero_point, q.zero_point - INT8_MIN) for q in layer.sources]
    exact = a.shape[-1] * reach[0] * reach[1] < _FLOAT32_INTEGERS
    dtype = torch.float32 if exact else torch.float64
    left, right = (x.to(dtype) - source.zero_point for x, source in zip((a, b), layer.sources, strict=True))
    sums = torch.matmul(left, right).contiguous()
    return requantize(sums.reshape(-1, sums.shape[-1]), packed.requantizer).reshape(sums.shape)
