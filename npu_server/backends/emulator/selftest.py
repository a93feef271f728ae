"""Start-up test: every way to sum against the specification, on patterns that break what is not exact.

On CPUs without VNNI, oneDNN's u8 x s8 kernels add pairs of products in 16 bits, which saturate without a
word; other kernels go wrong at odd sizes or strides. A way that differs in one sum is not used here.
"""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from npu_server.backends.emulator.native import Level, bind
from npu_server.backends.emulator.sums import Method, Task
from npu_server.compile.graph import Window
from npu_server.execution.sliding import positions
from npu_server.numerics.requantize import Output, accumulate, make_multiplier, requantize
from npu_server.numerics.rules import AccumulatorRule, RequantizeRule
from npu_server.numerics.scales import Int64Array
from npu_wire.errors import DeviceFault
from npu_wire.layer_map import Int8Array

log = logging.getLogger(__name__)


Way = TypeVar("Way", Method, Level)


@dataclass(frozen=True)
class Verdict(Generic[Way]):
    """What the test found.

    Attributes:
        trusted: the ways that were right everywhere, in their order.
        failed: names of the others.
    """

    trusted: tuple[Way, ...]
    failed: tuple[str, ...]


@functools.cache
def examine(methods: tuple[Method, ...], device: torch.device) -> Verdict[Method]:
    """Tries all methods; once a process, since a machine stays what it is.

    Raises:
        DeviceFault: not even the last one, which must serve everything, is exact.
    """
    failed = [method for method in methods if not is_exact(method, device)]
    if methods[-1] in failed:
        raise DeviceFault(f"{methods[-1].name} sums on {device} are not exact; use another --device")
    return _verdict(methods, failed, str(device))


@functools.cache
def examine_levels(levels: tuple[Level, ...]) -> Verdict[Level]:
    """Tries all native kernels; once a process."""
    return _verdict(levels, [level for level in levels if not computes_exactly(level)], "cpu")


def _verdict(ways: tuple[Way, ...], failed: Sequence[Way], where: str) -> Verdict[Way]:
    names = sorted(way.name for way in failed)
    for name in names:
        log.warning("%s sums wrongly on this machine (%s); a slower exact one replaces it", name, where)
    return Verdict(tuple(way for way in ways if way not in failed), tuple(names))


def is_exact(method: Method, device: torch.device) -> bool:
    """Whether a method sums every case that it serves as the specification does."""
    for task, image in _cases():
        if method.serves(task):
            sums = method.bind(task, device)(torch.from_numpy(image).to(device))
            actual = sums.cpu().numpy().astype(np.int64) + method.offset(task)
            if not np.array_equal(actual, expected_sums(task, image)):
                return False
    return True


def computes_exactly(level: Level) -> bool:
    """Whether native kernels make the specification's codes of every case that they serve.

    The rules and registers take turns over the cases, which are several of each shape.
    """
    rng = np.random.default_rng(1)
    rules = itertools.cycle(itertools.product(_RULES, _REGISTERS))
    for (task, image), (rule, register) in zip(_cases(), rules, strict=False):
        sums = expected_sums(task, image)
        bias = rng.integers(-1000, 1001, len(task.codes))
        # Most codes in range, some beyond it; powers of two make ties.
        ratio = 2.0 ** rng.integers(-3, 4, len(bias)) * 100 / max(1, int(np.abs(sums).max()))
        ratio = 2.0 ** np.rint(np.log2(ratio)) if rng.random() < 0.3 else ratio
        multiplier, output = make_multiplier(ratio, 1.0, rule), Output(int(rng.integers(-128, 128)), -120)
        layer = bind(level, task, bias, multiplier, register, output)
        if layer is not None:
            expected = requantize(accumulate(sums + bias, register), multiplier, output)
            if not np.array_equal(layer(torch.from_numpy(image)).numpy(), expected):
                return False
    return True


def expected_sums(task: Task, image: Int8Array) -> Int64Array:
    """The sums in NumPy int64, shape (N, output H, output W, out).

    Args:
        task: what to sum.
        image: int8 (N, H, W, C).
    """
    out, per_group, height, width = task.codes.shape
    grouped = task.codes.astype(np.int64).reshape(task.groups, out // task.groups, per_group, height * width)
    centred = image.transpose(0, 3, 1, 2).astype(np.int64) - task.zero_point
    total: Int64Array = np.zeros(1, np.int64)
    for k, covered in enumerate(positions(centred, task.window, 0)):
        n, _, rows, columns = covered.shape
        split = covered.reshape(n, task.groups, per_group, rows, columns)
        part = np.einsum("ngchw,goc->nhwgo", split, grouped[..., k])
        total = total + part.reshape(n, rows, columns, out)
    return total


_RULES = (
    RequantizeRule("q31", "half_away", 2),
    RequantizeRule("q31", "half_up", 1),
    RequantizeRule("power_of_two", "floor", 1),
    RequantizeRule("float32", "half_even", 1),
    RequantizeRule("float64", "half_away", 1),
)
_REGISTERS = (
    AccumulatorRule(32, "saturate", "sum"),
    AccumulatorRule(16, "saturate", "sum"),
    AccumulatorRule(20, "wrap", "sum"),
)

# in, out, groups, window, batch, image size. Vector code works in blocks of 4, 16, 32 and 64 channels.
_SHAPES: Sequence[tuple[int, int, int, Window, int, tuple[int, int]]] = (
    (1, 1, 1, Window((3, 3), (2, 2), (1, 1, 1, 1)), 2, (5, 4)),
    (3, 32, 1, Window((3, 3), (2, 2), (1, 1, 1, 1)), 2, (9, 8)),
    (3, 8, 1, Window((7, 7), (2, 2), (3, 3, 3, 3)), 1, (11, 9)),
    (5, 3, 1, Window((3, 2), (1, 2), (1, 0, 2, 1), (2, 1)), 2, (6, 5)),
    (16, 24, 1, Window((1, 1)), 2, (7, 5)),
    (24, 17, 1, Window((1, 1)), 3, (3, 5)),
    (64, 64, 1, Window((1, 1), (2, 2)), 1, (6, 6)),
    (130, 33, 1, Window((1, 1)), 1, (1, 1)),
    (128, 64, 1, Window((1, 1)), 3, (4, 5)),
    (64, 64, 1, Window((3, 3), (1, 1), (1, 1, 1, 1)), 1, (5, 6)),
    (33, 19, 1, Window((3, 3), (1, 1), (1, 1, 1, 1)), 2, (4, 4)),
    (260, 40, 1, Window((3, 3), (1, 1), (1, 1, 1, 1)), 1, (3, 3)),
    (33, 33, 33, Window((3, 3), (1, 1), (1, 1, 1, 1)), 2, (5, 7)),
    (64, 64, 64, Window((3, 3), (2, 2), (1, 1, 1, 1)), 1, (6, 6)),
    (72, 72, 72, Window((3, 3), (2, 2), (1, 1, 1, 1)), 1, (7, 9)),
    (8, 16, 8, Window((3, 3), (1, 1), (1, 1, 1, 1)), 2, (4, 5)),
    (32, 32, 4, Window((3, 3), (1, 1), (1, 1, 1, 1)), 1, (5, 5)),
    (12, 18, 6, Window((5, 5), (1, 1), (2, 2, 2, 2)), 1, (5, 6)),
)


def _cases() -> Iterator[tuple[Task, Int8Array]]:
    """Each shape with random codes, with the largest products of one sign, and with sums near 2^24."""
    rng = np.random.default_rng(0)
    for channels, out, groups, window, batch, size in _SHAPES:
        shape, image_shape = (out, channels // groups, *window.size), (batch, *size, channels)
        for zero_point in (-128, 3):
            codes = rng.integers(-128, 128, shape).astype(np.int8)
            image = rng.integers(-128, 128, image_shape).astype(np.int8)
            yield Task(codes, zero_point, window, groups), image
            # 255 * 127 twice is beyond 16 bits; 126 shows a low bit that is lost.
            alike = np.where(rng.random(shape) < 0.9, 127, 126).astype(np.int8)
            bright = np.where(rng.random(image_shape) < 0.9, 127, 126).astype(np.int8)
            yield Task(alike, zero_point, window, groups), bright
            ends = np.array([-128, 127], np.int8)
            yield Task(rng.choice(ends, shape), zero_point, window, groups), rng.choice(ends, image_shape)
        # The largest weight with which sums, up to 255 an input, stay below 2^24.
        largest = min(127, ((1 << 24) - 1) // (255 * int(np.prod(shape[1:]))))
        below = rng.integers(largest - 1, largest + 1, shape).astype(np.int8)
        yield Task(below, -128, window, groups), np.full(image_shape, 127, np.int8)
