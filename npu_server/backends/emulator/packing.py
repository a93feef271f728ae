"""Weights and multipliers in the form that the emulator's kernels want."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npu_server.backends.emulator.accumulate import Register, pack_register
from npu_server.backends.emulator.bounds import largest_sum
from npu_server.backends.emulator.fixed_point import fixed_point
from npu_server.backends.emulator.native import Level, NativeLayer, bind
from npu_server.backends.emulator.sums import ExactSums, Method, Task, exact_sums
from npu_server.compile.graph import Conv, MatMul, Window
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared
from npu_server.execution.pairs import Pairwise, combine, quantizations
from npu_server.numerics import elementwise
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import Multiplier
from npu_server.numerics.scales import Int64Array


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
        factor: float32 (ties to even) or float64 (ties away from zero).
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
class Packed:
    """A layer's constants on the device.

    Attributes:
        sums: how a convolution or fully connected layer adds up.
        requantizer: of a convolution or fully connected layer.
        register: of one whose register may saturate before the sum is complete; then `sums` is None.
        native: all of a convolution or fully connected layer in one; then the three above are None.
        tables: int8, (256,) each, for Lut, Clamp, Concat and Extreme; (65536,) for Add and Mul, entry
            (a + 128) * 256 + b + 128.
        constants: int8, logical order: the operand of Add, Sub, Mul, MatMul; those of Concat and Extreme.
        zero_points: of the factors of MatMul.
        prepared: what layers that the specification itself computes need.
    """

    sums: ExactSums | None = None
    requantizer: Requantizer | None = None
    register: Register | None = None
    native: NativeLayer | None = None
    tables: tuple[torch.Tensor, ...] = ()
    constants: tuple[torch.Tensor, ...] = ()
    zero_points: tuple[int, int] = (0, 0)
    prepared: Prepared | None = None


def pack_weights(
    layer: Layer,
    prepared: Prepared,
    profile: Profile,
    device: torch.device,
    methods: Sequence[Method],
    level: Level | None = None,
) -> Packed:
    """Packs a convolution or fully connected layer.

    Args:
        layer: the layer.
        prepared: its weights.
        profile: the arithmetic.
        device: where to compute.
        methods: ways to sum that are to be trusted; see `npu_server.backends.emulator.sums.exact_sums`.
        level: native kernels that are to be trusted; where they have no form for a layer, the methods do it.
    """
    assert prepared.weights is not None
    assert prepared.multiplier is not None
    codes, bias, zero_point = prepared.weights.codes, prepared.weights.bias, layer.sources[0].zero_point
    rule = profile.accumulator
    if rule.where == "every_mac":
        reach = largest_sum(codes, zero_point) + int(np.abs(bias).max())
        if reach >= 1 << (rule.bits - 1):
            # The register begins with the bias, so that none is left to add.
            requantizer = _requantizer(layer, prepared.multiplier, np.zeros_like(bias), profile, device)
            return Packed(requantizer=requantizer, register=pack_register(layer, prepared.weights, rule))
    operator = layer.operator
    window, groups = (operator.window, operator.groups) if isinstance(operator, Conv) else (Window((1, 1)), 1)
    task = Task(codes.reshape(*codes.shape[:2], *window.size), zero_point, window, groups)
    if level is not None:
        native = bind(level, task, bias, prepared.multiplier, rule, layer.output)
        if native is not None:
            return Packed(native=native)
    sums = exact_sums(task, device, methods)
    requantizer = _requantizer(layer, prepared.multiplier, bias + sums.offset, profile, device)
    return Packed(sums, requantizer)


def pack_tables(prepared: Prepared, device: torch.device) -> Packed:
    """Packs tables of 256 entries, and constants that are joined."""
    tables, constants = (
        tuple(torch.from_numpy(array).to(device) for array in arrays)
        for arrays in (prepared.tables, prepared.joined)
    )
    return Packed(tables=tables, constants=constants, prepared=prepared)


def pack_pairs(
    layer: Layer, operator: Pairwise, prepared: Prepared, profile: Profile, device: torch.device
) -> Packed:
    """What becomes of each pair of codes: 65,536 results of the specification itself."""
    a, b = elementwise.CODES.reshape(-1, 1), elementwise.CODES.reshape(1, -1)
    table = combine(layer, operator, prepared, a, b, profile)
    constants = () if prepared.operand is None else (prepared.operand.codes,)
    return Packed(
        tables=(torch.from_numpy(table.reshape(-1)).to(device),),
        constants=tuple(torch.from_numpy(codes).to(device) for codes in constants),
    )


def pack_matmul(layer: Layer, prepared: Prepared, profile: Profile, device: torch.device) -> Packed:
    """One multiplier for all columns of a product."""
    assert prepared.multiplier is not None
    one = prepared.multiplier
    columns = layer.shape[-1]
    everywhere = Multiplier(
        one.rule,
        np.broadcast_to(one.mantissa, columns),
        np.broadcast_to(one.shift, columns),
        np.broadcast_to(one.factor, columns),
    )
    bias = np.zeros(columns, np.int64)
    operator = layer.operator
    assert isinstance(operator, MatMul)
    first, second = quantizations(layer, operator, prepared)
    constants = () if prepared.operand is None else (prepared.operand.codes,)
    return Packed(
        requantizer=_requantizer(layer, everywhere, bias, profile, device),
        constants=tuple(torch.from_numpy(codes).to(device) for codes in constants),
        zero_points=(first.zero_point, second.zero_point),
    )


def _requantizer(
    layer: Layer, multiplier: Multiplier, bias: Int64Array, profile: Profile, device: torch.device
) -> Requantizer:
    mantissa, shift, positive, negative = fixed_point(multiplier)

    def vector(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(array, order="C")).to(
            device
        )  # torch wants memory that may be written

    return Requantizer(
        fixed_point=multiplier.rule.multiplier not in ("float32", "float64"),
        bias=vector(bias),
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
