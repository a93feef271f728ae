"""One method a kind of layer. Images are int8 (N, H, W, C) in memory, everything else as its shape says."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from npu_server.backends.emulator.images import image_windows, pad_image
from npu_server.backends.emulator.matrix import convolve, multiply
from npu_server.backends.emulator.packing import Packed, pack_pairs, pack_tables, pack_weights
from npu_server.backends.emulator.sums import METHODS, Method
from npu_server.backends.emulator.tables import look_up, look_up_pairs
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
from npu_server.numerics.profile import Profile
from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import INT8_MIN, Int8Array, MemoryLayout


class EmulatorKernels:
    """The arithmetic of `npu_server.backends.reference` on torch's kernels.

    Convolutions and matrix products are summed exactly (`sums`), then requantized. What works on single codes
    or pairs of codes is a table.
    """

    image_layout = MemoryLayout.CHANNELS_LAST

    def __init__(self, profile: Profile, device: torch.device, methods: Sequence[Method] = METHODS) -> None:
        """Takes the arithmetic and where to compute.

        Args:
            profile: the arithmetic.
            device: CPU or GPU.
            methods: ways to sum that are to be trusted.
        """
        self._methods = methods
        self._profile = profile
        self._device = device

    def pack(self, layer: Layer, prepared: Prepared) -> Packed:
        """Brings weights and tables to the device."""
        if isinstance(layer.kernel, Conv | Gemm):
            return pack_weights(layer, prepared, self._profile, self._device, self._methods)
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
                return convolve(layer, packed, x)
            case Gemm():
                return multiply(layer, packed, x)
            case Add() | Mul():
                return look_up_pairs(packed.tables[0], x, inputs[1])
            case Lut() | Clamp():
                return look_up(packed.tables[0], x)
            case Concat():
                axis = {1: 3, 2: 1, 3: 2}[kernel.axis] if x.ndim == 4 else kernel.axis
                return torch.cat(
                    [look_up(t, v) for t, v in zip(packed.tables, inputs, strict=True)], dim=axis
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
                codes = self._average(layer, sums, counts, "mean")
                return codes.reshape(len(x), 1, 1, -1) if len(layer.shape) == 3 else codes
            case Pad():
                return pad_image(x, kernel.pads, layer.output.zero_point)
            case Reshape():
                return _reshape(x, layer.shape)
        raise AssertionError(f"no kernel for {kernel}")

    def _average_pool(self, layer: Layer, kernel: AveragePool, x: torch.Tensor) -> torch.Tensor:
        if self._profile.average_pool.method == "float32_sum":
            # The order of float32 additions matters here: the specification itself computes it.
            codes = average_windows(layer, kernel, x.cpu().numpy().transpose(0, 3, 1, 2), self._profile)
            return torch.from_numpy(np.ascontiguousarray(codes.transpose(0, 2, 3, 1))).to(self._device)
        counts = window_counts(kernel, (x.shape[1], x.shape[2])).transpose(0, 2, 3, 1)
        return self._average(layer, _window_sums(layer, x, kernel.window), counts, "average_pool")

    def _average(
        self, layer: Layer, sums: torch.Tensor, counts: Int64Array, operator: Literal["mean", "average_pool"]
    ) -> torch.Tensor:
        # These tensors are small: the specification itself finishes them.
        totals: Int64Array = sums.cpu().numpy()
        codes = average(totals, counts, layer.sources[0], layer.scale, layer.output, operator, self._profile)
        return torch.from_numpy(np.ascontiguousarray(codes)).to(self._device)


def _with_overhang(window: Window) -> tuple[int, int, int, int]:
    top, left, bottom, right = window.pads
    return top, left, bottom + window.overhang[0], right + window.overhang[1]


def _max_pool(x: torch.Tensor, window: Window) -> torch.Tensor:
    padded = pad_image(x, _with_overhang(window), INT8_MIN).to(torch.float32).permute(0, 3, 1, 2)
    pooled = F.max_pool2d(padded, window.kernel, window.strides, 0, window.dilations)
    return pooled.permute(0, 2, 3, 1).to(torch.int8).contiguous()


def _window_sums(layer: Layer, x: torch.Tensor, window: Window) -> torch.Tensor:
    """Sums of centred codes over each window, int64, (N, H, W, C)."""
    zero_point = layer.sources[0].zero_point
    windows = image_windows(pad_image(x, _with_overhang(window), zero_point), window)
    return windows.sum(dim=(3, 4), dtype=torch.int64) - zero_point * window.kernel[0] * window.kernel[1]


def _reshape(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    logical = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
    # A copy: what was yielded under one name must not share memory with another tensor.
    result = logical.contiguous().reshape(len(x), *shape)
    result = result.permute(0, 2, 3, 1) if result.ndim == 4 else result
    return result.clone(memory_format=torch.contiguous_format)
