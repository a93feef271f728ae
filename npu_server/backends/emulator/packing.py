"""Weights and multipliers in the form that the emulator's kernels want, and the proof that floats suffice."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npu_server.backends.emulator.accumulate import Register, pack_register
from npu_server.compile.graph import Conv
from npu_server.compile.lowering import Layer
from npu_server.compile.weights import Prepared
from npu_server.numerics import elementwise
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import Multiplier
from npu_server.numerics.scales import Int64Array
from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array

_FLOAT32_INTEGERS = 1 << 24
_FLOAT64_INTEGERS = 1 << 53
_MAX_PARTS = 8


@dataclass(frozen=True)
class Requantizer:
    """Everything between an exact sum and the INT8 code, one entry an output channel.

    A fixed-point rule of any rounding is (v * mantissa + nudge) >> shift, with one nudge for v >= 0 and one
    for v < 0.

    Attributes:
        fixed_point: False: `factor` counts; True: mantissa, shift and nudges.
        bias: int64.
        mantissa: int64.
        shift: int64, >= 0.
        nudge_positive: int64.
        nudge_negative: int64.
        factor: float32.
        accumulator_bits: width of the register.
        wraps: it wraps instead of saturating.
        zero_point: of the output.
        low: smallest code.
        high: largest code.
    """

    fixed_point: bool
    bias: torch.Tensor
    mantissa: torch.Tensor
    shift: torch.Tensor
    nudge_positive: torch.Tensor
    nudge_negative: torch.Tensor
    factor: torch.Tensor
    accumulator_bits: int
    wraps: bool
    zero_point: int
    low: int
    high: int


@dataclass(frozen=True)
class Part:
    """Weights of some of a layer's input channels; the layer's sum is the sum over its parts.

    Attributes:
        channels: which input channels.
        weight: integer-valued float32 or float64, (out, channels / groups, h, w) or (out, channels).
    """

    channels: slice
    weight: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """A layer's constants on the device.

    Attributes:
        parts: weights of a convolution or fully connected layer.
        requantizer: of a convolution or fully connected layer.
        register: of one whose register may saturate before the sum is complete; then there are no parts.
        tables: int8, (256,) each, for Lut, Clamp and Concat; (65536,) for Add and Mul, entry (a + 128) * 256
            + b + 128.
    """

    parts: tuple[Part, ...] = ()
    requantizer: Requantizer | None = None
    register: Register | None = None
    tables: tuple[torch.Tensor, ...] = ()


def pack_weights(layer: Layer, prepared: Prepared, profile: Profile, device: torch.device) -> Packed:
    """Packs a convolution or fully connected layer."""
    assert prepared.weights is not None
    assert prepared.multiplier is not None
    codes, zero_point = prepared.weights.codes, layer.sources[0].zero_point
    requantizer = _requantizer(layer, prepared, profile, device)
    rule = profile.accumulator
    reach = largest_sum(codes, zero_point) + int(np.abs(prepared.weights.bias).max())
    if rule.where == "every_mac" and reach >= 1 << (rule.bits - 1):
        # The register begins with the bias, so that none is left to add.
        bare = replace(requantizer, bias=torch.zeros_like(requantizer.bias))
        return Packed(requantizer=bare, register=pack_register(layer, prepared.weights, rule))
    grouped = isinstance(layer.kernel, Conv) and layer.kernel.groups > 1
    parts = []
    for channels in [slice(None)] if grouped else exact_slices(codes, zero_point):
        part = np.ascontiguousarray(codes[:, channels])
        weight = torch.from_numpy(part).to(device, exact_dtype(largest_sum(part, zero_point)))
        order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        parts.append(Part(channels, weight.contiguous(memory_format=order)))
    return Packed(tuple(parts), requantizer)


def exact_slices(codes: Int8Array, zero_point: int) -> list[slice]:
    """The fewest equal slices of input channels whose sums float32 holds; one slice if there are none.

    Two convolutions in float32 take as long as one of twice the channels; one in float64 takes several times
    that.

    Args:
        codes: weights, int8, shape (out, in, ...).
        zero_point: of the input.
    """
    channels = codes.shape[1]
    for count in range(1, min(channels, _MAX_PARTS) + 1):
        edges = [channels * i // count for i in range(count + 1)]
        slices = [slice(a, b) for a, b in itertools.pairwise(edges)]
        if all(largest_sum(codes[:, s], zero_point) < _FLOAT32_INTEGERS for s in slices):
            return slices
    return [slice(0, channels)]


def pack_tables(tables: tuple[Int8Array, ...], device: torch.device) -> Packed:
    """Packs tables of 256 entries."""
    return Packed(tables=tuple(torch.from_numpy(table).to(device) for table in tables))


def pack_pairs(layer: Layer, profile: Profile, device: torch.device, product: bool) -> Packed:
    """Sum or product of each pair of codes: 65,536 results of the specification itself."""
    operator = elementwise.mul if product else elementwise.add
    a, b = elementwise.CODES.reshape(-1, 1), elementwise.CODES.reshape(1, -1)
    table = operator(a, layer.sources[0], b, layer.sources[1], layer.scale, layer.output, profile)
    return Packed(tables=(torch.from_numpy(table.reshape(-1)).to(device),))


def largest_sum(codes: Int8Array, zero_point: int) -> int:
    """Bound on the magnitude of every partial sum of products, in whatever order they are added.

    A centred input lies in [-128 - zero point, 127 - zero point]; both ends have their sign, so no partial
    sum exceeds the sum of the positive products' maxima or falls below that of the negative products' minima.

    Args:
        codes: weights, int8, shape (out, ...).
        zero_point: of the input.
    """
    low, high = INT8_MIN - zero_point, INT8_MAX - zero_point
    rows = codes.reshape(len(codes), -1).astype(np.int64)
    positive, negative = np.maximum(rows, 0).sum(axis=1), np.minimum(rows, 0).sum(axis=1)
    above = high * positive + low * negative
    below = low * positive + high * negative
    return int(max(above.max(), -below.min()))


def exact_dtype(bound: int) -> torch.dtype:
    """The fastest floating-point type that holds all integers up to a bound."""
    assert bound < _FLOAT64_INTEGERS
    return torch.float32 if bound < _FLOAT32_INTEGERS else torch.float64


def _requantizer(layer: Layer, prepared: Prepared, profile: Profile, device: torch.device) -> Requantizer:
    assert prepared.weights is not None
    assert prepared.multiplier is not None
    multiplier = prepared.multiplier
    mantissa, shift, positive, negative = fixed_point(multiplier)

    def vector(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Requantizer(
        fixed_point=multiplier.rule.multiplier != "float32",
        bias=vector(prepared.weights.bias),
        mantissa=vector(mantissa),
        shift=vector(shift),
        nudge_positive=vector(positive),
        nudge_negative=vector(negative),
        factor=vector(multiplier.factor),
        accumulator_bits=profile.accumulator.bits,
        wraps=profile.accumulator.overflow == "wrap",
        zero_point=layer.output.zero_point,
        low=layer.output.low,
        high=layer.output.high,
    )


def fixed_point(multiplier: Multiplier) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """Mantissa, shift and nudges so that the rule is (v * mantissa + nudge) >> shift.

    Two roundings fit into one: rounding v * M half up at bit 31 and the rest half away adds 2^30 to v * M,
    then half of what is left, less one unit of bit 31 where v < 0.
    """
    rule = multiplier.rule
    mantissa, shift = multiplier.mantissa, multiplier.shift
    if rule.multiplier == "power_of_two":
        # A negative shift multiplies.
        mantissa, shift = mantissa << np.clip(-shift, 0, 30), np.clip(shift, 0, 62)
    half = (np.int64(1) << shift) >> 1
    if rule.rounding == "floor":
        return mantissa, shift, np.zeros_like(half), np.zeros_like(half)
    if rule.multiplier == "power_of_two" or rule.steps == 1:
        lower = np.maximum(half - 1, 0) if rule.rounding == "half_away" else half
        return mantissa, shift, half, lower
    first = np.where(shift > 31, np.int64(1) << 30, 0)
    negative = half - first if rule.rounding == "half_away" else half + first
    return mantissa, shift, half + first, negative
