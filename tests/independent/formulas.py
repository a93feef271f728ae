"""The numbers of docs/describe-your-npu.md, "What the compiler computes", written from that page alone."""

from dataclasses import dataclass

import numpy as np

LOWEST, HIGHEST = -128, 127
_NO_SCALE_BELOW = 2.0**-100


@dataclass(frozen=True)
class Quantization:
    """real = (code - zero_point) * scale."""

    scale: np.float32
    zero_point: int


@dataclass(frozen=True)
class QuantizedWeights:
    """Weight codes int8 (out, ...), scales float32 (out,), bias codes int64 (out,)."""

    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray


def activation(low: float, high: float) -> Quantization:
    """Of an affine tensor whose real values lie in [low, high]."""
    low, high = min(0.0, low), max(0.0, high)
    scale = np.float32((high - low) / 255)
    zero_point = round(-128 - low / float(scale))  # Python rounds ties to even
    return Quantization(scale, min(HIGHEST, max(LOWEST, zero_point)))


def weights(
    weight: np.ndarray, bias: np.ndarray, x: Quantization, y: Quantization, per_channel: bool
) -> QuantizedWeights:
    """Of a convolution or a fully connected layer, everything folded in.

    Args:
        weight: float32 (out, ...).
        bias: float32 (out,).
        x: of the layer's input.
        y: of the layer's output.
        per_channel: one scale an output channel, or one for all.
    """
    magnitude = np.abs(weight).reshape(len(weight), -1).max(axis=1).astype(np.float64)
    for_bias = np.abs(bias.astype(np.float64)) / (float(x.scale) * 2.0**30)
    if not per_channel:
        magnitude[:], for_bias[:] = magnitude.max(), for_bias.max()
    dead = magnitude < _NO_SCALE_BELOW
    live_scales = np.maximum(magnitude / 127, for_bias)
    scales = np.where(dead, float(y.scale) / float(x.scale), live_scales).astype(np.float32)
    ratios = (weight.T / scales).T  # float32 by float32
    codes = np.clip(np.round(ratios), -127, 127).astype(np.int8)
    steps = bias.astype(np.float64) / (scales.astype(np.float64) * float(x.scale))
    limits = np.iinfo(np.int32)
    return QuantizedWeights(codes, scales, np.clip(np.round(steps), limits.min, limits.max).astype(np.int64))


def batch_norm(
    gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, variance: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Factor and summand of each channel, float32 step by step."""
    factor = gamma / np.sqrt(variance + np.float32(epsilon))
    return factor, beta - mean * factor


def fold(
    weight: np.ndarray, bias: np.ndarray, factor: np.ndarray, summand: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a layer whose output channels are multiplied and added to, float32."""
    return (weight.T * factor).T, bias * factor + summand


def as_convolution(weight: np.ndarray, groups: int) -> np.ndarray:
    """Weight (out, in / groups, ...) of a transposed convolution, which has (in, out / groups, ...)."""
    inputs, outputs, *kernel = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, *kernel)
    turned = np.moveaxis(split, 1, 2).reshape(groups * outputs, inputs // groups, *kernel)
    return np.flip(turned, (2, 3))


def bound_code(bound: float, y: Quantization) -> int:
    """Code of an activation's bound: float32 division, ties away from zero, clipped to INT8."""
    if np.isinf(bound):
        return LOWEST if bound < 0 else HIGHEST
    ratio = float(np.float32(bound) / y.scale)
    steps = np.trunc(ratio + np.copysign(0.5, ratio))
    return int(min(HIGHEST, max(LOWEST, steps + y.zero_point)))


def same_pads(
    size: tuple[int, int], kernel: list[int], strides: list[int], dilations: list[int], upper: bool
) -> list[int]:
    """(top, left, bottom, right) of SAME_UPPER or SAME_LOWER."""
    totals = []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        outputs = (n + s - 1) // s
        totals.append(max(0, (outputs - 1) * s + (k - 1) * d + 1 - n))
    less, more = [t // 2 for t in totals], [(t + 1) // 2 for t in totals]
    return less + more if upper else more + less


def quantize(real: np.ndarray, q: Quantization) -> np.ndarray:
    """Codes of real numbers, as the client quantizes the network's input."""
    return np.clip(np.round(real / q.scale) + q.zero_point, LOWEST, HIGHEST).astype(np.int8)
