"""Convolutions and matrix products. Images are int8 (N, H, W, C) in memory."""

import torch
import torch.nn.functional as F

from npu_server.backends.emulator.accumulate import saturating_sums
from npu_server.backends.emulator.packing import Packed
from npu_server.backends.emulator.requantize import requantize
from npu_server.compile.graph import Conv
from npu_server.compile.lowering import Layer


def convolve(layer: Layer, kernel: Conv, packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """A convolution: int8 (N, H, W, C), or (N, C) as one pixel."""
    assert packed.requantizer is not None
    image = x.reshape(len(x), 1, 1, -1) if x.ndim == 2 else x
    if packed.register is not None:
        nhwc = saturating_sums(packed.register, image, layer.sources[0].zero_point)
        codes = requantize(nhwc.reshape(-1, nhwc.shape[3]), packed.requantizer)
        return codes.reshape(x.shape if x.ndim == 2 else nhwc.shape)
    window = kernel.window
    top, left, bottom, right = window.pads
    symmetric = (top, left) == (bottom, right)
    padding = (top, left) if symmetric else (0, 0)
    convolution = F.conv2d if x.device.type == "cpu" else convolve_by_columns
    sums = []
    for part in packed.parts:
        codes = centred(layer, image[..., part.channels], part.weight.dtype)
        nchw = image_first(codes if symmetric else pad_image(codes, window.pads, 0))
        nchw_sums = convolution(
            nchw, part.weight, None, window.strides, padding, window.dilations, kernel.groups
        )
        sums.append(nchw_sums.permute(0, 2, 3, 1))
    nhwc = _total(sums).contiguous()
    codes = requantize(nhwc.reshape(-1, nhwc.shape[3]), packed.requantizer)
    return codes.reshape(x.shape if x.ndim == 2 else nhwc.shape)


def multiply(layer: Layer, packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """A fully connected layer: int8 (..., in)."""
    assert packed.requantizer is not None
    if packed.register is not None:
        pixels = x.reshape(-1, 1, 1, x.shape[-1])
        held = saturating_sums(packed.register, pixels, layer.sources[0].zero_point)
        codes = requantize(held.reshape(len(pixels), -1), packed.requantizer)
        return codes.reshape(*x.shape[:-1], -1)
    sums = _total(
        [F.linear(centred(layer, x[..., p.channels], p.weight.dtype), p.weight) for p in packed.parts]
    )
    return requantize(sums.reshape(-1, sums.shape[-1]), packed.requantizer).reshape(sums.shape)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum of exact sums; in float64 where there is more than one, since together they may leave float32."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(torch.float64)
    for part in parts[1:]:
        total += part
    return total


def centred(layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of the layer's first input less their zero point, in floating point."""
    real = x.to(dtype, memory_format=torch.contiguous_format)
    zero_point = layer.sources[0].zero_point
    return real.sub_(zero_point) if zero_point else real


def image_first(nhwc: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) on the same memory."""
    if nhwc.shape[3] > 1:
        return nhwc.permute(0, 3, 1, 2)
    # With one channel both orders are the same memory, but torch 2.13 on oneDNN convolves wrongly (batch > 1)
    # where the # strides are those of a transposed view.
    return nhwc.reshape(len(nhwc), 1, nhwc.shape[1], nhwc.shape[2])


def convolve_by_columns(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """Convolution as a matrix product: cuDNN may choose Winograd or FFT, which leave the integers."""
    out, per_group, *size = weight.shape
    columns = F.unfold(x, tuple(size), dilation, padding, stride).reshape(
        len(x), groups, per_group * size[0] * size[1], -1
    )
    sums = torch.matmul(weight.reshape(groups, out // groups, -1), columns)
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    height = (x.shape[2] + 2 * padding[0] - reach[0]) // stride[0] + 1
    return sums.reshape(len(x), out, height, -1)


def pad_image(x: torch.Tensor, pads: tuple[int, int, int, int], value: float) -> torch.Tensor:
    """An image (N, H, W, C) with `value` around it."""
    top, left, bottom, right = pads
    return F.pad(x, (0, 0, left, right, top, bottom), value=value)
