"""Ways to sum integer products, each with the condition under which the sum is exact.

A condition is proven for each layer from its quantized weights. Besides, every way is tried at start-up
against the specification (`selftest`), because a CPU or a library may do otherwise than it says.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from npu_server.backends.emulator.bounds import largest_sum
from npu_server.backends.emulator.images import image_first, image_windows, pad_image
from npu_server.compile.graph import Window
from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import Int8Array

_FLOAT32_INTEGERS = 1 << 24
_FLOAT64_INTEGERS = 1 << 53
_INT32_INTEGERS = 1 << 31
_MAX_PARTS = 8


@dataclass(frozen=True)
class Task:
    """What is to be summed: weights times codes less their zero point, over a window and a group's channels.

    Attributes:
        codes: weights, int8, shape (out, in / groups, height, width).
        zero_point: of the input; what padding holds.
        window: how the weights move over an image; a fully connected layer sees images of one pixel.
        groups: of channels.
    """

    codes: Int8Array
    zero_point: int
    window: Window
    groups: int = 1

    @property
    def padding_is_symmetric(self) -> bool:
        """Whether it is what convolutions take as padding."""
        return self.window.pads[:2] == self.window.pads[2:]


Sums = Callable[[torch.Tensor], torch.Tensor]
"""int8 image (N, H, W, C) -> sums (N, output H, output W, out), contiguous: int32, float32 or float64."""


class Method(Protocol):
    """A way to sum."""

    @property
    def name(self) -> str:
        """What the fingerprint, the log and the metrics call it."""
        ...

    def serves(self, task: Task) -> bool:
        """Whether it is exact for these weights."""
        ...

    def prefers(self, task: Task) -> bool:
        """Whether it is the fastest for this kind of layer, by the measurements in docs/performance.md."""
        ...

    def offset(self, task: Task) -> Int64Array:
        """What has to be added to its sums, shape (out,)."""
        ...

    def bind(self, task: Task, device: torch.device) -> Sums:
        """Brings the weights into its form."""
        ...


class FloatingPoint:
    """Floating-point units: exact while no partial sum, in whatever order, leaves the format's integers.

    A centred code is at most 255, a weight at most 128. TF32 holds integers up to 2,048, BF16 up to 256, so
    no operand is rounded, whatever precision torch is set to for float32. In those modes too, sums stay in
    float32, and it is sums that the condition is about.
    """

    def __init__(self, dtype: torch.dtype, by_columns: bool = False) -> None:
        """Takes the format.

        Args:
            dtype: float32 or float64.
            by_columns: multiplies matrices of columns, because cuDNN may choose Winograd or FFT, which leave
                the integers; else torch convolves.
        """
        self._dtype = dtype
        self._by_columns = by_columns
        self._limit = _FLOAT32_INTEGERS if dtype == torch.float32 else _FLOAT64_INTEGERS
        self.name = str(dtype).removeprefix("torch.")

    def serves(self, task: Task) -> bool:
        """Sums below 2^24 or 2^53."""
        return largest_sum(task.codes, task.zero_point) < self._limit

    def prefers(self, task: Task) -> bool:
        """What is left by integer units."""
        return True

    def offset(self, task: Task) -> Int64Array:
        """None: codes are centred first."""
        return np.zeros(len(task.codes), np.int64)

    def bind(self, task: Task, device: torch.device) -> Sums:
        """Weights in the format."""
        weight = torch.from_numpy(task.codes).to(device, self._dtype)
        if self._by_columns:
            return lambda x: _float_columns(task, weight, x.to(self._dtype) - task.zero_point)
        weight = weight.contiguous(memory_format=torch.channels_last)
        window, symmetric = task.window, task.padding_is_symmetric
        padding = window.pads[:2] if symmetric else (0, 0)

        def sums(x: torch.Tensor) -> torch.Tensor:
            centred = x.to(self._dtype)
            if task.zero_point:
                centred.sub_(task.zero_point)
            nchw = image_first(centred if symmetric else pad_image(centred, window.pads, 0))
            convolved = F.conv2d(nchw, weight, None, window.strides, padding, window.dilations, task.groups)
            return convolved.permute(0, 2, 3, 1).contiguous()

        return sums


class OneDnnConvolution:
    """oneDNN's u8 x s8 convolution (CPU), whose int32 sums come out as float32 (all scales 1).

    Exact while the sum is below 2^24, with and without the zero point's share: which of the two oneDNN
    converts is its own affair. Square windows with equal strides of 1 or 2 only: of random others, dilated or
    with unequal strides or wide padding, oneDNN 3.12 sums one in 150 wrongly and crashes on one in 1,300.
    """

    name = "int8 convolution"

    def serves(self, task: Task) -> bool:
        """The usual windows; sums below 2^24 of centred codes as of codes + 128."""
        window, size = task.window, task.window.size[0]
        usual = (
            window.size == (size, size)
            and window.strides in ((1, 1), (2, 2))
            and window.dilations == (1, 1)
            and max(window.pads) <= size // 2
        )
        bounds = (largest_sum(task.codes, zero_point) for zero_point in (task.zero_point, -128))
        return usual and all(bound < _FLOAT32_INTEGERS for bound in bounds)

    def prefers(self, task: Task) -> bool:
        """Wherever the matrix product is not."""
        return True

    def offset(self, task: Task) -> Int64Array:
        """None: oneDNN takes the zero point."""
        return np.zeros(len(task.codes), np.int64)

    def bind(self, task: Task, device: torch.device) -> Sums:
        """Packs as oneDNN wants it."""
        window, symmetric = task.window, task.padding_is_symmetric
        padding = list(window.pads[:2]) if symmetric else [0, 0]
        geometry = (list(window.strides), padding, list(window.dilations), task.groups)
        ones, zeros = torch.ones(len(task.codes)), torch.zeros(len(task.codes), dtype=torch.int32)
        weight = torch.from_numpy(np.ascontiguousarray(task.codes))
        packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *geometry, None)
        # s8 with a zero point is u8 with one of 128 more; in two's complement that flips the first bit.
        zero_point = task.zero_point + 128

        def sums(x: torch.Tensor) -> torch.Tensor:
            padded = x if symmetric else pad_image(x, window.pads, task.zero_point)
            unsigned = image_first(padded.bitwise_xor(-128).view(torch.uint8))
            output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
            convolved: torch.Tensor = torch.ops.onednn.qconv_pointwise(
                unsigned, 1.0, zero_point, packed, ones, zeros, None, *geometry, *output
            )
            return convolved.permute(0, 2, 3, 1).contiguous()

        return sums


class MatrixProduct:
    """s8 x s8 -> int32 (`torch._int_mm`: VNNI, AMX, tensor cores) of columns.

    Exact while int32 holds the sum. The zero point's share is taken off with the bias.
    """

    name = "int8 matrix product"

    def __init__(self, on_tensor_cores: bool = False) -> None:
        """Takes what the device wants.

        Args:
            on_tensor_cores: it is cuBLASLt: more than 16 rows, all other sizes in eights.
        """
        self._on_tensor_cores = on_tensor_cores

    def serves(self, task: Task) -> bool:
        """One group; sums of uncentred codes below 2^31; torch 2.13 is wrong for a single column on a CPU."""
        columns = task.codes[0].size
        return task.groups == 1 and columns > 1 and largest_sum(task.codes, 0) < _INT32_INTEGERS

    def prefers(self, task: Task) -> bool:
        """CPU: many channels, or pixels that are in one window each; a GPU has nothing better."""
        window, channels = task.window, int(task.codes.shape[1])
        apart = window.size != (1, 1) and window.strides == window.size
        least = 96 if window.size == (1, 1) else 256
        return self._on_tensor_cores or apart or channels >= least

    def offset(self, task: Task) -> Int64Array:
        """Zero point times the sum of the weights."""
        total: Int64Array = task.codes.reshape(len(task.codes), -1).sum(axis=1, dtype=np.int64)
        return -task.zero_point * total

    def bind(self, task: Task, device: torch.device) -> Sums:
        """Weights as a transposed matrix (columns, out)."""
        rows = np.ascontiguousarray(task.codes.transpose(0, 2, 3, 1)).reshape(len(task.codes), -1)
        weight = torch.from_numpy(rows).to(device)
        step, fewest = (8, 17) if self._on_tensor_cores else (1, 1)
        weight = F.pad(weight, (0, -weight.shape[1] % step, 0, -len(weight) % step)).t()

        def sums(x: torch.Tensor) -> torch.Tensor:
            padded = pad_image(x, task.window.pads, task.zero_point) if any(task.window.pads) else x
            windows = image_windows(padded, task.window)
            # Windows of a narrow image are a matrix whose rows overlap, which torch 2.13 multiplies wrongly.
            flat = windows.reshape(-1, rows.shape[1]).contiguous()
            count = len(flat)
            missing = (0, -flat.shape[1] % step, 0, max(fewest - count, 0))
            flat = F.pad(flat, missing) if any(missing) else flat
            product = torch._int_mm(flat, weight)[:count, : len(rows)]
            return product.reshape(*windows.shape[:3], len(rows))

        return sums


CPU_METHODS: tuple[Method, ...] = (
    MatrixProduct(),
    OneDnnConvolution(),
    FloatingPoint(torch.float32),
    FloatingPoint(torch.float64),
)
CUDA_METHODS: tuple[Method, ...] = (
    MatrixProduct(on_tensor_cores=True),
    FloatingPoint(torch.float32, by_columns=True),
    FloatingPoint(torch.float64, by_columns=True),
)
"""In the order of preference; the last one serves every task."""


@dataclass(frozen=True)
class Part:
    """Some of a layer's input channels; the layer's sum is the sum over its parts.

    Attributes:
        channels: which input channels.
        sums: of these.
    """

    channels: slice
    sums: Sums


@dataclass(frozen=True)
class ExactSums:
    """How a layer is summed.

    Attributes:
        method: name of the method.
        parts: one, or several where only parts are exact.
        offset: to be added to the sum over the parts, int64, shape (out,).
    """

    method: str
    parts: tuple[Part, ...]
    offset: Int64Array

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Sums of an int8 image (N, H, W, C), less the offset."""
        if len(self.parts) == 1:
            return self.parts[0].sums(x)
        # float64: together they may leave float32.
        total = self.parts[0].sums(x[..., self.parts[0].channels].contiguous()).to(torch.float64)
        for part in self.parts[1:]:
            total += part.sums(x[..., part.channels].contiguous())
        return total


def exact_sums(task: Task, device: torch.device, methods: Sequence[Method]) -> ExactSums:
    """Takes the first method that prefers the task and is exact for it, on all channels or on parts of them.

    Two convolutions of half the channels take as long as one of all; one in float64 takes several times that.

    Args:
        task: what to sum.
        device: where.
        methods: in order of preference; the last one must serve everything.
    """
    for method in methods:
        if not method.prefers(task):
            continue
        for slices in _divisions(task):
            tasks = [_part(task, channels) for channels in slices]
            if all(method.serves(part) for part in tasks):
                parts = [Part(c, method.bind(t, device)) for c, t in zip(slices, tasks, strict=True)]
                offset = np.sum([method.offset(part) for part in tasks], axis=0)
                return ExactSums(method.name, tuple(parts), offset)
    raise AssertionError(f"no method sums {task.codes.shape} exactly")


def _divisions(task: Task) -> list[list[slice]]:
    """All channels, their halves, their thirds, ..."""
    channels = task.codes.shape[1]
    most = 1 if task.groups > 1 else min(channels, _MAX_PARTS)
    edges = [[channels * i // count for i in range(count + 1)] for count in range(1, most + 1)]
    return [[slice(a, b) for a, b in itertools.pairwise(e)] for e in edges]


def _part(task: Task, channels: slice) -> Task:
    return Task(task.codes[:, channels], task.zero_point, task.window, task.groups)


def _float_columns(task: Task, weight: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    out, per_group, *size = weight.shape
    windows = image_windows(pad_image(centred, task.window.pads, 0), task.window)
    columns = windows.reshape(-1, size[0] * size[1], task.groups, per_group).permute(2, 0, 1, 3).flatten(2)
    grouped = weight.reshape(task.groups, out // task.groups, per_group, -1).permute(0, 3, 2, 1).flatten(1, 2)
    sums = torch.bmm(columns, grouped).permute(1, 0, 2)
    return sums.reshape(*windows.shape[:3], out)
