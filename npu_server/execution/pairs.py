"""Sums, differences and products of two tensors of codes, one of which may be a constant; matrix products."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from npu_server.compile.graph import Add, MatMul, Mul, Sub
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared
from npu_server.numerics import elementwise
from npu_server.numerics.profile import Profile
from npu_server.numerics.requantize import saturating_sum
from npu_server.numerics.rules import AccumulatorRule
from npu_server.numerics.scales import Int64Array, Quantization
from npu_wire.layer_map import Int8Array

Pairwise = Add | Sub | Mul
TwoOperands = Pairwise | MatMul
Tensor = TypeVar("Tensor")


def in_order(operator: TwoOperands, activations: Sequence[Tensor], constant: Tensor | None) -> list[Tensor]:
    """The two operands, the constant in its place."""
    if constant is None:
        return list(activations)
    first = isinstance(operator, Sub | MatMul) and operator.constant_first
    return [constant, activations[0]] if first else [activations[0], constant]


def quantizations(layer: Layer, operator: TwoOperands, prepared: Prepared) -> list[Quantization]:
    """Those of the two operands."""
    constant = None if prepared.operand is None else prepared.operand.quantization
    return in_order(operator, layer.sources, constant)


def multiply_and_saturate(a: Int64Array, b: Int64Array, rule: AccumulatorRule) -> Int64Array:
    """Matrix product in a register that saturates after each product ("every_mac").

    Args:
        a: centred codes, shape (..., M, K).
        b: centred codes, shape (..., K, N).
        rule: of the register.
    """
    products = (a[..., k : k + 1] * b[..., k : k + 1, :] for k in range(a.shape[-1]))
    return saturating_sum(np.zeros(1, np.int64), products, rule)


def combine(
    layer: Layer, operator: Pairwise, prepared: Prepared, a: Int8Array, b: Int8Array, profile: Profile
) -> Int8Array:
    """Sum, difference or product of codes that broadcast, in the output's scale."""
    qa, qb = quantizations(layer, operator, prepared)
    if isinstance(operator, Mul):
        return elementwise.mul(a, qa, b, qb, layer.scale, layer.output, profile)
    sign = -1 if isinstance(operator, Sub) else 1
    return elementwise.add(a, qa, b, qb, layer.scale, layer.output, profile, sign)
