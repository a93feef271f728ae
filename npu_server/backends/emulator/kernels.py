"""One method a kind of layer. Images are int8 (N, H, W, C) in memory, everything else as its shape says."""

import numpy as np
import torch
import torch.nn.functional as F

from npu_server.backends.emulator.packing import Packed, pack_pairs, pack_tables, pack_weights
from npu_server.backends.emulator.requantize import requantize
from npu_server.compile.graph import (
    Add,
    AveragePool,
    Clamp,
    Concat,
    Conv,
    Gemm,
    Lut,
    MaxPool,
    Mean,
    Mul,
    Pad,
    Reshape,
    Window,
)
from npu_server.compile.lowering import Layer
from npu_server.compile.sliding import average_windows, window_counts
from npu_server.compile.weights import Prepared
from npu_server.numerics.elementwise import average
from npu_server.numerics.profile import AverageRule, Profile
from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import INT8_MIN, Int8Array, MemoryLayout


class EmulatorKernels:
    """The arithmetic of `npu_server.backends.reference` on torch's floating-point kernels.

    Sums of integer products are exact in float32 or float64 as long as they stay small enough, which
    `packing` proves for each layer from its quantized weights. What works on single codes or pairs of codes
    is a table.
    """

    image_layout = MemoryLayout.CHANNELS_LAST

    def __init__(self, profile: Profile, device: torch.device) -> None:
        """Takes the arithmetic and where to compute.

        Args:
            profile: the arithmetic.
            device: CPU or GPU.
        """
        self._profile = profile
        self._device = device

    def pack(self, layer: Layer, prepared: Prepared) -> Packed:
        """Brings weights and tables to the device."""
        if isinstance(layer.kernel, Conv | Gemm):
            return pack_weights(layer, prepared, self._profile, self._device)
        if isinstance(layer.kernel, Add | Mul):
            return pack_pairs(layer, self._profile, self._device, isinstance(layer.kernel, Mul))
        return pack_tables(prepared.tables, self._device)

    def load(self, batch: Int8Array) -> torch.Tensor:
        """The input on the device, images with channels last."""
        ordered = batch.transpose(0, 2, 3, 1) if batch.ndim == 4 else batch
        # A copy: torch wants memory that it may write, and the caller keeps its own.
        return torch.from_numpy(np.array(ordered, order="C")).to(self._device)

    def export(self, layer: Layer, tensor: torch.Tensor) -> Int8Array:
        """A NumPy view (a copy from a GPU) in logical order."""
        array: Int8Array = tensor.cpu().numpy()
        return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array

    def execute(self, layer: Layer, packed: Packed, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Computes one layer."""
        kernel, x = layer.kernel, inputs[0]
        match kernel:
            case Conv():
                return self._convolve(layer, kernel, packed, x)
            case Gemm():
                assert packed.requantizer is not None
                sums = _total(
                    [
                        F.linear(_centred(layer, x[..., p.channels], p.weight.dtype), p.weight)
                        for p in packed.parts
                    ]
                )
                return requantize(sums.reshape(-1, sums.shape[-1]), packed.requantizer).reshape(sums.shape)
            case Add() | Mul():
                return _look_up_pairs(packed.tables[0], x, inputs[1])
            case Lut() | Clamp():
                return _look_up(packed.tables[0], x)
            case Concat():
                axis = {1: 3, 2: 1, 3: 2}[kernel.axis] if x.ndim == 4 else kernel.axis
                return torch.cat(
                    [_look_up(t, v) for t, v in zip(packed.tables, inputs, strict=True)], dim=axis
                )
            case MaxPool():
                return _max_pool(x, kernel.window)
            case AveragePool():
                return self._average_pool(layer, kernel, x)
            case Mean():
                sums = (
                    x.sum(dim=(1, 2), dtype=torch.int64)
                    - x.shape[1] * x.shape[2] * layer.sources[0].zero_point
                )
                counts = np.array(x.shape[1] * x.shape[2])
                codes = self._average(layer, sums, counts, self._profile.mean)
                return codes.reshape(len(x), 1, 1, -1) if len(layer.shape) == 3 else codes
            case Pad():
                return _pad(x, kernel.pads, layer.output.zero_point)
            case Reshape():
                return _reshape(x, layer.shape)
        raise AssertionError(f"no kernel for {kernel}")

    def _convolve(self, layer: Layer, kernel: Conv, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        assert packed.requantizer is not None
        image = x.reshape(len(x), 1, 1, -1) if x.ndim == 2 else x
        window = kernel.window
        top, left, bottom, right = window.pads
        symmetric = (top, left) == (bottom, right)
        padding = (top, left) if symmetric else (0, 0)
        convolve = F.conv2d if x.device.type == "cpu" else _convolve_by_columns
        sums = []
        for part in packed.parts:
            centred = _centred(layer, image[..., part.channels], part.weight.dtype)
            nchw = _image_first(centred if symmetric else _pad(centred, window.pads, 0))
            nchw_sums = convolve(
                nchw, part.weight, None, window.strides, padding, window.dilations, kernel.groups
            )
            sums.append(nchw_sums.permute(0, 2, 3, 1))
        nhwc = _total(sums).contiguous()
        codes = requantize(nhwc.reshape(-1, nhwc.shape[3]), packed.requantizer)
        return codes.reshape(x.shape if x.ndim == 2 else nhwc.shape)

    def _average_pool(self, layer: Layer, kernel: AveragePool, x: torch.Tensor) -> torch.Tensor:
        if self._profile.average_pool.method == "float32_sum":
            # The order of float32 additions matters here: the specification itself computes it.
            codes = average_windows(layer, kernel, x.cpu().numpy().transpose(0, 3, 1, 2), self._profile)
            return torch.from_numpy(np.ascontiguousarray(codes.transpose(0, 2, 3, 1))).to(self._device)
        counts = window_counts(kernel, (x.shape[1], x.shape[2])).transpose(0, 2, 3, 1)
        return self._average(layer, _window_sums(layer, x, kernel.window), counts, self._profile.average_pool)

    def _average(
        self, layer: Layer, sums: torch.Tensor, counts: Int64Array, rule: AverageRule
    ) -> torch.Tensor:
        # These tensors are small: the specification itself finishes them.
        totals: Int64Array = sums.cpu().numpy()
        codes = average(totals, counts, layer.sources[0], layer.scale, layer.output, rule, self._profile)
        return torch.from_numpy(np.ascontiguousarray(codes)).to(self._device)


def _total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum of exact sums; in float64 where there is more than one, since together they may leave float32."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(torch.float64)
    for part in parts[1:]:
        total += part
    return total


def _centred(layer: Layer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    real = x.to(dtype, memory_format=torch.contiguous_format)
    zero_point = layer.sources[0].zero_point
    return real.sub_(zero_point) if zero_point else real


def _image_first(nhwc: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) on the same memory."""
    if nhwc.shape[3] > 1:
        return nhwc.permute(0, 3, 1, 2)
    # With one channel both orders are the same memory, but torch 2.13 on oneDNN convolves wrongly (batch > 1)
    # where the # strides are those of a transposed view.
    return nhwc.reshape(len(nhwc), 1, nhwc.shape[1], nhwc.shape[2])


def _convolve_by_columns(
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


def _look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return table[x.to(torch.int32) + 128]


def _look_up_pairs(table: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return table[((a.to(torch.int32) + 128) << 8) + (b.to(torch.int32) + 128)]


def _pad(x: torch.Tensor, pads: tuple[int, int, int, int], value: float) -> torch.Tensor:
    top, left, bottom, right = pads
    return F.pad(x, (0, 0, left, right, top, bottom), value=value)


def _with_overhang(window: Window) -> tuple[int, int, int, int]:
    top, left, bottom, right = window.pads
    return top, left, bottom + window.overhang[0], right + window.overhang[1]


def _max_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    padded = _pad(x, _with_overhang(window), INT8_MIN).to(torch.float32).permute(0, 3, 1, 2)
    pooled = F.max_pool2d(padded, window.kernel, window.strides, 0, window.dilations)
    return pooled.permute(0, 2, 3, 1).to(torch.int8).contiguous()


def _window_sums(layer: Layer, x: torch.Tensor, window: Window) -> torch.Tensor:
    """Sums of centred codes over each window, int64, (N, H, W, C); float64 holds them all."""
    centred = _pad(_centred(layer, x, torch.float64), _with_overhang(window), 0)
    ones = torch.ones((x.shape[3], 1, *window.kernel), dtype=torch.float64, device=x.device)
    convolve = F.conv2d if x.device.type == "cpu" else _convolve_by_columns
    sums = convolve(_image_first(centred), ones, None, window.strides, (0, 0), window.dilations, x.shape[3])
    return sums.permute(0, 2, 3, 1).to(torch.int64).contiguous()


def _reshape(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    logical = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
    # A copy: what was yielded under one name must not share memory with another tensor.
    result = logical.contiguous().reshape(len(x), *shape)
    result = result.permute(0, 2, 3, 1) if result.ndim == 4 else result
    return result.clone(memory_format=torch.contiguous_format)
