"""A convolution or fully connected layer for the native kernels, and the proof that they are exact."""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npu_server.backends.emulator.bounds import largest_sums, signed_sums
from npu_server.backends.emulator.fixed_point import fixed_point
from npu_server.backends.emulator.native.library import Level, Structure
from npu_server.backends.emulator.sums import Task
from npu_server.numerics.requantize import Multiplier, Output
from npu_server.numerics.rules import AccumulatorRule
from npu_server.numerics.scales import Int64Array
from npu_wire.errors import DeviceFault

_INT32_INTEGERS = 1 << 31
_LARGEST_WINDOW = 64
_FEWEST_CHANNELS = 4
"""Of a group that is not one channel alone: below, the panels are hardly filled."""
_LEAST_WORK = 1 << 20
"""Multiplications for which a thread is worth waking."""
_TWO_STEPS, _FIXED, _FLOAT32, _FLOAT64 = range(4)


@dataclass(frozen=True)
class NativeLayer:
    """A packed layer: int8 image (N, H, W, C) -> int8 codes (N, output H, output W, out).

    Attributes:
        level: the instruction set.
        task: weights and window.
        constants: arrays that `structure` points into.
        structure: what the kernels read, all but the image's size.
    """

    level: Level
    task: Task
    constants: dict[str, npt.NDArray[Any]]
    structure: Structure

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Computes the codes, with as many threads as torch uses."""
        image = image.contiguous()
        samples, height, width, _ = image.shape
        structure = Structure.from_buffer_copy(self.structure)
        structure.height, structure.width = height, width
        structure.out_height, structure.out_width = self.task.window.output_size(height, width)
        shape = (samples, structure.out_height, structure.out_width, structure.outputs)
        codes = torch.empty(shape, dtype=torch.int8)
        pixels = samples * structure.out_height * structure.out_width

        def compute(first: int, last: int) -> None:
            status = self.level.run(ctypes.byref(structure), image.data_ptr(), codes.data_ptr(), first, last)
            if status:
                raise DeviceFault(f"no memory for the windows of {last - first} pixels")

        _in_threads(compute, pixels, pixels * self.task.codes.size)
        return codes


def _in_threads(compute: Callable[[int, int], None], pixels: int, work: int) -> None:
    threads = max(1, min(torch.get_num_threads(), work // _LEAST_WORK))
    edges = [pixels * i // threads for i in range(threads + 1)]
    if threads == 1:
        return compute(0, pixels)
    others = [_pool().submit(compute, *edges[i : i + 2]) for i in range(1, threads)]
    compute(*edges[:2])
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that wait for work: to start some for each layer would cost more than a layer."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="native-kernels")


def bind(
    level: Level, task: Task, bias: Int64Array, multiplier: Multiplier, rule: AccumulatorRule, output: Output
) -> NativeLayer | None:
    """Packs a layer, or None where the kernels have no form for it or int32 might not hold its sums.

    Args:
        level: the instruction set.
        task: weights and window.
        bias: shape (out,).
        multiplier: from the sums to the output.
        rule: of a register that is complete before it overflows (`AccumulatorRule.where`).
        output: zero point and clamp.
    """
    out, channels, *size = task.codes.shape
    depthwise = channels == 1 and task.groups == out > 1
    if size[0] * size[1] > _LARGEST_WINDOW if depthwise else task.groups > 1 and channels < _FEWEST_CHANNELS:
        return None
    reach = largest_sums(task.codes, task.zero_point) + np.abs(bias)
    if reach.max() >= _INT32_INTEGERS:
        return None
    limit, wraps = 1 << (rule.bits - 1), rule.overflow == "wrap"
    reach = np.minimum(reach, limit)
    numbers = _requantization(multiplier, reach, output.zero_point)
    window, total = task.window, sum(signed_sums(task.codes))
    structure = Structure(
        channels=channels * task.groups,
        outputs=out,
        kernel_h=size[0],
        kernel_w=size[1],
        stride_h=window.strides[0],
        stride_w=window.strides[1],
        dilation_h=window.dilations[0],
        dilation_w=window.dilations[1],
        pad_top=window.pads[0],
        pad_left=window.pads[1],
        groups=task.groups,
        depthwise=depthwise,
        rule=numbers.pop("rule"),
        narrow=rule.bits < 32,
        wrapped_bits=32 - rule.bits if wraps else 0,
        register_low=-limit,
        register_high=limit - 1,
        zero_point=output.zero_point,
        low=output.low,
        high=output.high,
    )
    order = np.empty(level.positions(ctypes.byref(structure)), np.int64)
    level.order(ctypes.byref(structure), order.ctypes.data)
    start = bias - (task.zero_point + level.offset()) * total
    constants = {"start": start.astype(np.int32), **numbers}  # modulo 2^32
    constants = {
        name: np.where(order < 0, 0, array[order]).astype(array.dtype) for name, array in constants.items()
    }
    codes = np.ascontiguousarray(task.codes)
    constants["weights"] = np.zeros(level.packed_bytes(ctypes.byref(structure)), np.int8)
    level.pack(ctypes.byref(structure), codes.ctypes.data, constants["weights"].ctypes.data)
    constants["padding"] = np.full(-(-4 * structure.channels // 64) * 64, task.zero_point, np.int8)
    for name, array in constants.items():
        setattr(structure, name, array.ctypes.data)
    return NativeLayer(level, task, constants, structure)


def _requantization(multiplier: Multiplier, reach: Int64Array, zero_point: int) -> dict[str, Any]:
    """The rule and its constants: in 32 bits where sums are small enough, else in 64."""
    rule, shift = multiplier.rule, multiplier.shift
    if rule.multiplier == "float32":
        return {"rule": _FLOAT32, "factor": multiplier.factor.astype(np.float32)}
    if rule.multiplier == "float64":
        return {"rule": _FLOAT64, "wide_factor": multiplier.factor.astype(np.float64)}
    if rule.multiplier == "power_of_two":
        # 2 * 2 * v * 2^30 is v in the high half.
        left, mantissa, right = 2 + np.maximum(-shift, 0), np.full_like(shift, 1 << 30), np.maximum(shift, 0)
    else:
        left, mantissa, right = 32 - np.minimum(shift, 31), multiplier.mantissa, np.maximum(shift - 31, 0)
    steps = rule.steps == 2 or rule.multiplier == "power_of_two"
    # The zero point is added before the last shift, to at most 2^30 and half of that shift.
    if steps and right.max() <= 22 and left.max() < 32 and (reach << left).max() < _INT32_INTEGERS:
        half = (1 << right) >> 1 if rule.rounding != "floor" else np.zeros_like(right)
        sign = np.where((right > 0) & (rule.rounding == "half_away"), 31, 32)
        numbers = {
            "left": left,
            "mantissa": mantissa,
            "half": half + (zero_point << right),
            "sign": sign,
            "right": right,
        }
        return {"rule": _TWO_STEPS, **{name: array.astype(np.int32) for name, array in numbers.items()}}
    mantissa, shift, positive, negative = fixed_point(multiplier)
    return {
        "rule": _FIXED,
        "mantissa": mantissa.astype(np.int32),
        "nudge": positive,
        "step": negative - positive,
        "shift": shift,
    }
