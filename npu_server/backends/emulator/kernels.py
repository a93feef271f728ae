"""One method a kind of layer. Images are int8 (N, H, W, C) in memory, everything else as its shape says."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from npu_server.backends.emulator import moving, native
from npu_server.backends.emulator.attention import multiply_activations
from npu_server.backends.emulator.images import image_windows, pad_image, window_maxima
from npu_server.backends.emulator.matrix import convolve, multiply
from npu_server.backends.emulator.moving import as_image, from_image, logical, stored
from npu_server.backends.emulator.native import Level
from npu_server.backends.emulator.packing import Packed, pack_matmul, pack_pairs, pack_tables, pack_weights
from npu_server.backends.emulator.sums import CPU_METHODS, Method
from npu_server.backends.emulator.tables import look_up, look_up_pairs
from npu_server.compile.graph import (
    Add,
    AveragePool,
    Clamp,
    Concat,
    Conv,
    Extreme,
    Gemm,
    HostFloat,
    HostPart,
    Interpolate,
    Largest,
    Lut,
    MatMul,
    MaxPool,
    Mean,
    Mul,
    Pad,
    PRelu,
    Rearrange,
    Reshape,
    Select,
    Smallest,
    Sub,
    Sum,
    Window,
)
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared
from npu_server.execution.host import compute_on_host
from npu_server.execution.host_part import run_part
from npu_server.execution.pairs import combine, in_order
from npu_server.execution.sliding import average_windows, window_counts
from npu_server.numerics.elementwise import average, total
from npu_server.numerics.profile import Profile
from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import INT8_MIN, Int8Array, MemoryLayout

_TABLE_ELEMENTS = 256
"""A pair of tensors with fewer elements a sample is computed as fast without a table of 65,536 entries."""

_MOST_TABLES = 2048
"""Tables of pairs in one program, 64 KiB each."""


class EmulatorKernels:
    """The arithmetic of `npu_server.backends.reference` on torch's kernels.

    Convolutions and matrix products are summed exactly (`sums`), then requantized. What works on single codes
    or pairs of codes is a table.
    """

    image_layout = MemoryLayout.CHANNELS_LAST

    def __init__(
        self,
        profile: Profile,
        device: torch.device,
        methods: Sequence[Method] = CPU_METHODS,
        levels: Sequence[Level] | None = None,
    ) -> None:
        """Takes the arithmetic and where to compute.

        Args:
            profile: the arithmetic.
            device: CPU or GPU.
            methods: ways to sum that are to be trusted.
            levels: native kernels that are to be trusted, the first of which computes on a CPU; None: all
                that this CPU has.
        """
        levels = native.levels() if levels is None else levels
        self._level = levels[0] if levels and device.type == "cpu" else None
        self._methods = methods
        self._profile = profile
        self._device = device
        self._tabled: set[str] = set()
        self.work_at_once = 6_000_000_000 if device.type == "cpu" else 600_000_000_000

    def pack(self, layer: Layer, prepared: Prepared) -> Packed:
        """Brings weights and tables to the device."""
        if isinstance(layer.operator, Conv | Gemm):
            return pack_weights(layer, prepared, self._profile, self._device, self._methods, self._level)
        if isinstance(layer.operator, Add | Sub | Mul):
            if not self._is_worth_a_table(layer):
                return Packed(prepared=prepared)
            return pack_pairs(layer, layer.operator, prepared, self._profile, self._device)
        if isinstance(layer.operator, MatMul):
            return pack_matmul(layer, prepared, self._profile, self._device)
        return pack_tables(prepared, self._device)

    def _is_worth_a_table(self, layer: Layer) -> bool:
        """Not for a few numbers; nor for every layer of a model that is small and has thousands of them."""
        name = layer.spec.name
        if math.prod(layer.shape) >= _TABLE_ELEMENTS and len(self._tabled) < _MOST_TABLES:
            self._tabled.add(name)
        return name in self._tabled

    def load(self, batch: Int8Array) -> torch.Tensor:
        """The input on the device, images with channels last."""
        ordered = batch.transpose(0, 2, 3, 1) if batch.ndim == 4 else batch
        # A copy: torch wants memory that it may write, and the caller keeps its own.
        copy = np.empty(ordered.shape, np.int8)
        if ordered.ndim == 4 and ordered.shape[3] <= 4:
            for channel in range(ordered.shape[3]):  # four times as fast as all at once
                copy[..., channel] = ordered[..., channel]
        else:
            copy[...] = ordered
        return torch.from_numpy(copy).to(self._device)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One after the other."""
        joined = torch.empty(
            (sum(map(len, parts)), *parts[0].shape[1:]), dtype=torch.int8, device=self._device
        )
        return torch.cat(parts, out=joined)

    def export(self, layer: Layer, tensor: torch.Tensor) -> Int8Array:
        """A NumPy view (a copy from a GPU) in logical order."""
        array: Int8Array = tensor.cpu().numpy()
        return array.transpose(0, 3, 1, 2) if array.ndim == 4 else array

    def execute(self, layer: Layer, packed: Packed, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Computes one layer."""
        operator, x = layer.operator, inputs[0]
        match operator:
            case Conv():
                image = as_image(x)
                if operator.stuffing is not None:
                    image = moving.stuff(image, operator.stuffing, layer.sources[0].zero_point)
                return from_image(convolve(layer, packed, image), x.ndim)
            case Gemm():
                rows = logical(x).movedim(operator.axis, -1).contiguous()
                return stored(multiply(layer, packed, rows).movedim(-1, operator.axis))
            case MatMul():
                constant = packed.constants[0] if packed.constants else None
                factors = in_order(operator, [logical(x) for x in inputs], constant)
                return stored(multiply_activations(packed, factors, self._profile.accumulator))
            case Add() | Sub() | Mul():
                if not packed.tables:
                    return self._pair(layer, operator, packed, inputs)
                constant = stored(packed.constants[0]) if packed.constants else None
                return look_up_pairs(packed.tables[0], *in_order(operator, inputs, constant))
            case Lut() | Clamp():
                return look_up(packed.tables[0], x)
            case PRelu():
                slopes = torch.arange(len(packed.tables[0]), device=x.device).reshape(operator.slope.shape)
                return packed.tables[0][stored(slopes), x.to(torch.int32) + 128]
            case Concat():
                return _concat(operator, packed, inputs)
            case Extreme():
                parts = [look_up(table, x) for table, x in zip(packed.tables, inputs, strict=True)]
                parts += [stored(codes) for codes in packed.constants]
                return functools.reduce(torch.maximum if operator.largest else torch.minimum, parts)
            case MaxPool():
                padded = pad_image(as_image(x), _with_overhang(operator.window), INT8_MIN)
                return from_image(window_maxima(padded, operator.window), x.ndim)
            case AveragePool():
                return from_image(self._average_pool(layer, operator, as_image(x)), x.ndim)
            case Mean() | Sum():
                return self._reduce(layer, operator, logical(x))
            case Largest():
                highest = logical(x).amax(dim=operator.axes)
                return stored(highest.reshape(len(x), *layer.shape))
            case Smallest():
                return stored(logical(x).amin(dim=operator.axes).reshape(len(x), *layer.shape))
            case Pad():
                return stored(moving.pad(logical(x), operator.pads, layer.output.zero_point))
            case Reshape():
                return _copied(logical(x).reshape(len(x), *layer.shape), x)
            case Rearrange():
                return _copied(moving.rearrange(logical(x), operator).reshape(len(x), *layer.shape), x)
            case Select():
                return _copied(moving.select(logical(x), operator).reshape(len(x), *layer.shape), x)
            case Interpolate():
                return from_image(moving.interpolate(as_image(x), operator), x.ndim)
            case HostFloat() | HostPart():
                return self._on_host(layer, operator, packed, inputs)
        raise AssertionError(f"no kernel for {operator}")

    def _reduce(self, layer: Layer, operator: Mean | Sum, x: torch.Tensor) -> torch.Tensor:
        count = math.prod(x.shape[axis] for axis in operator.axes)
        sums = x.sum(dim=operator.axes, dtype=torch.int64) - count * layer.sources[0].zero_point
        shaped = sums.reshape(len(x), *layer.shape)
        if isinstance(operator, Mean):
            low, high = int(shaped.min()), int(shaped.max())
            if high - low >= shaped.numel():
                return stored(self._average(layer, shaped, np.array(count), "mean"))
            # Fewer different sums than elements: each is averaged once.
            every = torch.arange(low, high + 1, device=self._device)
            return stored(self._average(layer, every, np.array(count), "mean")[shaped - low])
        # These tensors are small: the specification itself finishes them.
        source, output = layer.sources[0], layer.output
        codes = total(shaped.cpu().numpy(), count, source, layer.scale, output, self._profile)
        return stored(torch.from_numpy(codes).to(self._device))

    def _pair(
        self, layer: Layer, operator: Add | Sub | Mul, packed: Packed, inputs: list[torch.Tensor]
    ) -> torch.Tensor:
        """Two small tensors: the specification itself computes them."""
        assert packed.prepared is not None
        constant = None if packed.prepared.operand is None else packed.prepared.operand.codes
        a, b = in_order(operator, [logical(x).cpu().numpy() for x in inputs], constant)
        codes = combine(layer, operator, packed.prepared, a, b, self._profile)
        return stored(torch.from_numpy(np.ascontiguousarray(codes)).to(self._device))

    def _on_host(
        self, layer: Layer, operator: HostFloat | HostPart, packed: Packed, inputs: list[Any]
    ) -> torch.Tensor:
        assert packed.prepared is not None
        # Raw inputs of a part are arrays already.
        arrays = [
            np.ascontiguousarray(logical(x).cpu().numpy()) if isinstance(x, torch.Tensor) else x
            for x in inputs
        ]
        if isinstance(operator, HostPart):
            codes = run_part(layer, operator, packed.prepared, arrays)
        else:
            codes = compute_on_host(layer, operator, packed.prepared, arrays)
        return stored(torch.from_numpy(np.ascontiguousarray(codes)).to(self._device))

    def _average_pool(self, layer: Layer, operator: AveragePool, x: torch.Tensor) -> torch.Tensor:
        if self._profile.average_pool.method == "float32_sum":
            # The order of float32 additions matters here: the specification itself computes it.
            codes = average_windows(layer, operator, x.cpu().numpy().transpose(0, 3, 1, 2), self._profile)
            return torch.from_numpy(np.ascontiguousarray(codes.transpose(0, 2, 3, 1))).to(self._device)
        counts = window_counts(operator, (x.shape[1], x.shape[2])).transpose(0, 2, 3, 1)
        return self._average(layer, _window_sums(layer, x, operator.window), counts, "average_pool")

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


def _window_sums(layer: Layer, x: torch.Tensor, window: Window) -> torch.Tensor:
    """Sums of centred codes over each window, int64, (N, H, W, C)."""
    zero_point = layer.sources[0].zero_point
    windows = image_windows(pad_image(x, _with_overhang(window), zero_point), window)
    return windows.sum(dim=(3, 4), dtype=torch.int64) - zero_point * window.size[0] * window.size[1]


def _concat(operator: Concat, packed: Packed, inputs: list[torch.Tensor]) -> torch.Tensor:
    parts = [look_up(table, x) for table, x in zip(packed.tables, inputs, strict=True)]
    for (position, _), codes in zip(operator.constants, packed.constants, strict=True):
        constant = stored(codes)
        parts.insert(position, constant.expand(len(inputs[0]), *constant.shape[1:]))
    axis = {1: 3, 2: 1, 3: 2}[operator.axis] if inputs[0].ndim == 4 else operator.axis
    return torch.cat(parts, dim=axis)


def _copied(result: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """In its order in memory, and never on the source's: what was yielded stays as it is."""
    dense = stored(result)
    return (
        dense.clone() if dense.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() else dense
    )
