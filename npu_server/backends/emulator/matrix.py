"""Convolutions and fully connected layers: exact sums, then requantization. Images are int8 (N, H, W, C)."""

import torch

from npu_server.backends.emulator.accumulate import saturating_sums
from npu_server.backends.emulator.packing import Packed
from npu_server.backends.emulator.requantize import requantize
from npu_server.compile.planning.lowering import Layer


def convolve(layer: Layer, packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """A convolution: int8 (N, H, W, C), or (N, C) as one pixel."""
    if x.ndim == 2:
        return multiply(layer, packed, x)
    return _codes(layer, packed, x)


def multiply(layer: Layer, packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """A fully connected layer: int8 (..., in), a row as an image of one pixel."""
    return _codes(layer, packed, x.reshape(-1, 1, 1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _codes(layer: Layer, packed: Packed, image: torch.Tensor) -> torch.Tensor:
    if packed.native is not None:
        return packed.native(image)
    assert packed.requantizer is not None
    if packed.register is not None:
        sums = saturating_sums(packed.register, image, layer.sources[0].zero_point)
    else:
        assert packed.sums is not None
        sums = packed.sums(image)
    return requantize(sums.reshape(-1, sums.shape[3]), packed.requantizer).reshape(sums.shape)
