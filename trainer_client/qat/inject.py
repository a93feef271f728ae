"""Injection of the NPU's tensor into the FP32 forward pass.

The forward value becomes the dequantized INT8 tensor itself (not y + noise, which rounds). The gradient goes
straight
through to the FP32 layer, except where it would mislead: where the mismatch exceeds `MISMATCH_LIMIT_LSB` (an
accumulator that saturated, say), where the code is clipped, and where an activation fused into the pass is
flat.

On the CPU all of it is one pass over memory; elsewhere the same arithmetic in torch gives the same bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_wire.layer_map import Int8Array, LayerSpec, TensorSpec
from trainer_client.qat.inject_kernels import inject_pass, mask_pass
from trainer_client.qat.noise import LayerNoise

MISMATCH_LIMIT_LSB = 3


@dataclass(frozen=True)
class InjectionRule:
    """How one INT8 tensor is injected.

    Attributes:
        scale: real value of one LSB.
        zero_point: code of real 0.
        saturation_low: largest code that counts as clipped from below.
        saturation_high: smallest code that counts as clipped from above.
        lower: the FP32 value is clamped to at least this first; the gradient is zero at and below it.
        upper: the FP32 value is clamped to at most this first; the gradient is zero at and above it.
        outer: elements before the batch in the FP32 value's order; the NPU's tensor begins with the batch.
    """

    scale: float
    zero_point: int
    saturation_low: int = -128
    saturation_high: int = 127
    lower: float = -math.inf
    upper: float = math.inf
    outer: int = 1


def rule_of_layer(layer: LayerSpec, lower: float = -math.inf, upper: float = math.inf) -> InjectionRule:
    """The rule of a layer's output, with the bounds of an activation that the pass shall apply."""
    return InjectionRule(
        layer.output.scale,
        layer.output.zero_point,
        layer.saturation_low,
        layer.saturation_high,
        lower,
        upper,
        layer.output.outer,
    )


def rule_of_tensor(spec: TensorSpec) -> InjectionRule:
    """The rule of a tensor that is quantized with plain clipping, such as the model's input."""
    return InjectionRule(spec.scale, spec.zero_point)


def inject(
    y: Tensor, q: Int8Array, rule: InjectionRule, overwrite: bool = False
) -> tuple[Tensor, LayerNoise]:
    """Replaces an FP32 value by the NPU's and measures the difference.

    Args:
        y: FP32 value before the activation that `rule` bounds, shape (n, ...), any float dtype and device.
        q: the NPU's codes, as many elements as y in the same logical order (but for `rule.outer`), any memory
            order.
        rule: scale, clipping and activation.
        overwrite: the result may take y's memory. Only for a y that nobody else reads and whose producer does
            not keep it for its backward; autograd raises an error if it does.

    Returns:
        The dequantized tensor (float32, y's shape and device, bit-equal to `npu_wire.quantize.dequantize`)
        and the noise against the clamped y.
    """
    q = in_shape_of(q, tuple(y.shape), rule)
    if y.dtype != torch.float32:
        y, overwrite = y.float(), False
    if y.device.type != "cpu":
        return _inject_torch(y, torch.from_numpy(q.copy(order="K")).to(y.device), rule)
    overwrite = overwrite and not y._is_view()  # autograd would copy the base of a view
    if memory_order(y) is None:
        y, overwrite = y.contiguous(), False
    values = y.detach()
    out = values if overwrite else torch.empty_like(values)
    mask, noise = _compare(values, q, rule, out)
    return _attach(y, None if overwrite else out, mask), noise


def measure(y: Tensor, q: Int8Array, rule: InjectionRule) -> tuple[Tensor | None, LayerNoise]:
    """The mask and the noise of `inject`, for a y that nobody needs afterwards: its memory is written to.

    Returns:
        True where the gradient passes, in y's shape; None where it passes everywhere.
    """
    q = in_shape_of(q, tuple(y.shape), rule)
    y = y.detach().float()
    if y.device.type != "cpu":
        _, mask, noise = _compare_torch(y, torch.from_numpy(q.copy(order="K")).to(y.device), rule)
        return mask, noise
    y = y if memory_order(y) is not None else y.contiguous()
    return _compare(y, q, rule, y)


def in_shape_of(q: Int8Array, shape: tuple[int, ...], rule: InjectionRule) -> Int8Array:
    """The NPU's codes in the shape of the FP32 value that they stand for."""
    if rule.outer > 1:
        q = q.reshape(q.shape[0], rule.outer, -1).swapaxes(0, 1)
    return q if q.shape == shape else q.reshape(shape)


def _compare(y: Tensor, q: Int8Array, rule: InjectionRule, out: Tensor) -> tuple[Tensor | None, LayerNoise]:
    """Dequantizes into `out`, which may be y; mask (None: all true) and noise. All float32 on the CPU."""
    order = memory_order(y)
    assert order is not None
    mask = torch.empty_like(y, dtype=torch.bool)
    sums = np.zeros(4, np.float64)
    counts = np.zeros(3, np.int64)
    inject_pass(
        flat(y, order),
        # Copies only codes that lie in another order than y.
        np.ascontiguousarray(q.transpose(order)).reshape(-1),
        np.float32(rule.scale),
        np.float32(rule.zero_point),
        np.float32(MISMATCH_LIMIT_LSB) * np.float32(rule.scale),
        np.int16(rule.saturation_low),
        np.int16(rule.saturation_high),
        np.float32(rule.lower),
        np.float32(rule.upper),
        flat(out, order),
        flat(mask, order).view(np.uint8),
        sums,
        counts,
    )
    masked, saturated, passed = counts.tolist()
    noise = _layer_noise(y.numel(), rule.scale, sums.tolist(), masked, saturated)
    return None if passed == y.numel() else mask, noise


def _inject_torch(y: Tensor, q: Tensor, rule: InjectionRule) -> tuple[Tensor, LayerNoise]:
    out, mask, noise = _compare_torch(y.detach(), q, rule)
    return _attach(y, out, mask), noise


def _compare_torch(y: Tensor, q: Tensor, rule: InjectionRule) -> tuple[Tensor, Tensor, LayerNoise]:
    """`_compare` in torch operations, for other devices than the CPU; y float32, q int8, on one device."""
    with torch.no_grad():
        scale = torch.tensor(rule.scale, dtype=torch.float32, device=y.device)
        out = (q.to(torch.float32) - float(rule.zero_point)) * scale
        clamped = y.clamp(rule.lower, rule.upper)
        noise = out - clamped
        saturated = (q <= rule.saturation_low) | (q >= rule.saturation_high)
        matches = (noise.abs() <= MISMATCH_LIMIT_LSB * scale) & ~saturated
        mask = matches & (y > rule.lower) & (y < rule.upper)
        wide = noise.double()
        magnitude = wide.abs()
        sums = torch.stack(
            [clamped.double().square().sum(), wide.square().sum(), magnitude.sum(), magnitude.max()]
        )
        masked, clipped = torch.stack([(~matches).sum(), saturated.sum()]).tolist()
    return out, mask, _layer_noise(y.numel(), rule.scale, sums.tolist(), masked, clipped)


def _layer_noise(elements: int, scale: float, sums: list[float], masked: int, saturated: int) -> LayerNoise:
    signal, energy, magnitude, peak = sums
    return LayerNoise(elements, signal, energy, magnitude / scale, peak / scale, masked, saturated)


def _attach(y: Tensor, out: Tensor | None, mask: Tensor | None) -> Tensor:
    """Joins the value to y's autograd history; `out` None: y's memory already holds the value."""
    if out is None:
        return _StraightThroughInPlace.apply(y, mask)  # type: ignore[no-any-return, no-untyped-call]
    return _StraightThrough.apply(y, out, mask)  # type: ignore[no-any-return, no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """Value `out`, gradient of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, out: Tensor, mask: Tensor | None) -> Tensor:
        """Returns `out`."""
        ctx.save_for_backward(mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Passes the gradient where the mask is true."""
        return masked(grad, ctx.saved_tensors[0]), None, None


class _StraightThroughInPlace(torch.autograd.Function):
    """Tells autograd that y's memory has been overwritten; the gradient passes where the mask is true."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mask: Tensor | None) -> Tensor:
        """Returns y."""
        ctx.mark_dirty(y)
        ctx.save_for_backward(mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Passes the gradient where the mask is true."""
        return masked(grad, ctx.saved_tensors[0]), None


def masked(grad: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient where the mask is true, 0 elsewhere; never written over `grad`, which others may hold."""
    if mask is None:
        return grad
    order = memory_order(mask) if mask.device.type == "cpu" and grad.dtype == torch.float32 else None
    if order is None or not grad.permute(order).is_contiguous():
        return torch.where(mask, grad, 0.0)
    out = torch.empty_like(grad)
    mask_pass(flat(grad, order), flat(mask, order).view(np.uint8), flat(out, order))
    return out


def memory_order(t: Tensor) -> tuple[int, ...] | None:
    """Order of the dimensions in which a dense tensor lies in memory; None if it is neither usual order."""
    if t.is_contiguous():
        return tuple(range(t.ndim))
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return (0, 2, 3, 1)
    return None


def flat(t: Tensor, order: tuple[int, ...]) -> npt.NDArray[Any]:
    """The elements of a dense CPU tensor in their order in memory, without a copy."""
    return t.permute(order).view(-1).numpy()
