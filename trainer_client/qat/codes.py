"""Tensors of the NPU as the lean step keeps them: INT8 codes, a quarter of the memory of their values."""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npu_wire.layer_map import INT8_MAX, INT8_MIN, Int8Array
from trainer_client.qat.inject import InjectionRule, flat, in_shape_of, masked, memory_order
from trainer_client.qat.inject_kernels import dequantize_pass, gate_pass


@dataclass(frozen=True)
class Held:
    """A tensor of the NPU on its way through the training graph.

    Attributes:
        carrier: of the value's shape and device, its numbers without a meaning and without memory: what
            autograd sees of the tensor.
        codes: int8, the same shape; images channels-last, all else row-major.
        rule: what the codes stand for.
    """

    carrier: Tensor
    codes: Tensor
    rule: InjectionRule


def codes_of(q: Int8Array, shape: tuple[int, ...], rule: InjectionRule, device: torch.device) -> Tensor:
    """The NPU's codes in the order and on the device of the FP32 value, without a copy where they lie so."""
    q = in_shape_of(q, shape, rule)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The given NumPy array is not writable"
        )  # nor is it written
        codes = torch.from_numpy(q)
    order = torch.channels_last if codes.ndim == 4 else torch.contiguous_format
    return codes.to(device).contiguous(memory_format=order)


def carrier_of(codes: Tensor) -> Tensor:
    """A tensor of one number that looks as large as the value."""
    return torch.zeros((), dtype=torch.float32, device=codes.device).expand(codes.shape)


def dequantized(codes: Tensor, rule: InjectionRule) -> Tensor:
    """The values, in the order of the codes."""
    if codes.device.type != "cpu":
        scale = torch.tensor(rule.scale, dtype=torch.float32, device=codes.device)
        return (codes.to(torch.float32) - float(rule.zero_point)) * scale
    order = memory_order(codes)
    assert order is not None
    values = torch.empty_like(codes, dtype=torch.float32)
    numbers = np.float32(rule.scale), np.float32(rule.zero_point)
    dequantize_pass(flat(codes, order), *numbers, flat(values, order))
    return values


def gated(grad: Tensor, codes: Tensor, mask: Tensor | None, rule: InjectionRule) -> Tensor:
    """The gradient where it passes, 0 elsewhere, in the order of the codes; never written over `grad`.

    Args:
        grad: of the value.
        codes: of the value.
        mask: where it passes; None: wherever the code is neither clipped nor at a bound of the activation.
        rule: of the value.
    """
    if mask is not None:
        return masked(grad, mask)
    low, high = _open_interval(rule)
    order = torch.channels_last if codes.ndim == 4 else torch.contiguous_format
    if low < INT8_MIN and high > INT8_MAX:
        return grad.contiguous(memory_format=order)
    if codes.device.type != "cpu" or grad.dtype != torch.float32:
        return torch.where((codes > low) & (codes < high), grad, 0.0)
    grad = grad.contiguous(memory_format=order)
    out = torch.empty_like(grad)
    dims = memory_order(codes)
    assert dims is not None
    gate_pass(flat(grad, dims), flat(codes, dims), np.int16(low), np.int16(high), flat(out, dims))
    return out


def _open_interval(rule: InjectionRule) -> tuple[int, int]:
    """Codes between which a gradient passes; at a bound of the activation the layer is flat."""
    low, high = rule.saturation_low, rule.saturation_high
    if math.isfinite(rule.lower):
        low = max(low, min(round(rule.lower / rule.scale) + rule.zero_point, INT8_MAX))
    if math.isfinite(rule.upper):
        high = min(high, max(round(rule.upper / rule.scale) + rule.zero_point, INT8_MIN))
    return low, high
