"""The layers of a lean step as autograd functions: no forward pass, the FP32 layer's backward pass.

A layer saves the codes of what it reads and dequantizes them when its backward pass comes. The results are
those of the ordinary step: the same operators on the same numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer_client.qat.codes import Held, carrier_of, dequantized, gated
from trainer_client.qat.inject import InjectionRule
from trainer_client.qat.lean_graph import Addition, Convolution, LeanLayer, Product

Operand = Held | Any
"""Of a layer: a tensor of the NPU, a weight, a raw input of any type."""


def attach(
    layer: LeanLayer, codes: Tensor, rule: InjectionRule, mask: Tensor | None, operands: Sequence[Operand]
) -> Held:
    """The layer's tensor, joined to the autograd history of what it was computed from.

    Args:
        layer: the layer.
        codes: what the NPU has computed.
        rule: of the codes.
        mask: where gradients pass; None: as the codes say.
        operands: in the order of the layer's graph.
    """
    carriers = [operand.carrier if isinstance(operand, Held) else operand for operand in operands]
    carrier = _Layer.apply(layer, codes, rule, mask, operands, *carriers)  # type: ignore[no-untyped-call]
    return Held(carrier, codes, rule)


def value_of(held: Held) -> Tensor:
    """The real numbers, with the tensor's autograd history."""
    return _Value.apply(held.carrier, held.codes, held.rule)  # type: ignore[no-any-return, no-untyped-call]


def quantized(x: Tensor, codes: Tensor, rule: InjectionRule) -> Held:
    """An input as the NPU sees it; its gradient passes where the codes are not clipped."""
    return Held(_Quantized.apply(x, codes, rule), codes, rule)  # type: ignore[no-untyped-call]


def computed(layer: LeanLayer, operands: Sequence[Operand]) -> Tensor:
    """The FP32 value of a layer before its activation, without a gradient."""
    with torch.no_grad():
        values = [dequantized(x.codes, x.rule) if isinstance(x, Held) else x for x in operands]
        result: Tensor = layer.compute(*values)
        return result


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, codes: Tensor, rule: InjectionRule) -> Tensor:
        return dequantized(codes, rule)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, rule: InjectionRule) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(codes)
        return carrier_of(codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return gated(grad, ctx.saved_tensors[0], None, ctx.rule), None, None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: LeanLayer,
        codes: Tensor,
        rule: InjectionRule,
        mask: Tensor | None,
        operands: Sequence[Operand],
        *carriers: Any,
    ) -> Tensor:
        ctx.layer, ctx.rule = layer, rule
        ctx.rules = [x.rule if isinstance(x, Held) else None for x in operands]
        kept = [x.codes if isinstance(x, Held) else x for x in operands]
        if isinstance(layer.form, Addition):  # its backward pass needs no values
            kept = [None] * len(kept)
            ctx.shapes = [x.shape for x in carriers]
        ctx.others = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.save_for_backward(codes, mask, *(x if isinstance(x, Tensor) else None for x in kept))
        return carrier_of(codes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, mask, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        grad = gated(grad, codes, mask, ctx.rule)
        form = ctx.layer.form
        if isinstance(form, Addition):
            return *_NO_GRADIENT, *_of_addition(form, grad, ctx.shapes, needed)
        values = [
            x if x is None or rule is None else dequantized(x, rule)
            for x, rule in zip(kept, ctx.rules, strict=True)
        ]
        if isinstance(form, Convolution):
            return *_NO_GRADIENT, *_of_convolution(form, grad, values, needed)
        if isinstance(form, Product):
            return *_NO_GRADIENT, *_of_product(form, grad, values, needed)
        operands = [other if x is None else x for x, other in zip(values, ctx.others, strict=True)]
        return *_NO_GRADIENT, *_recomputed(ctx.layer, grad, operands, needed)


_NO_GRADIENT = (None,) * 5  # layer, codes, rule, mask, operands


def _of_addition(
    form: Addition, grad: Tensor, shapes: Sequence[torch.Size], needed: Sequence[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(shapes)
    for i in (form.first, form.second):
        if needed[i]:
            part = grad.sum_to_size(shapes[i])
            before = found[i]
            found[i] = part if before is None else before + part  # x + x
    return found


def _of_convolution(
    form: Convolution, grad: Tensor, values: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(values)
    wanted = [needed[form.source], needed[form.weight], False]
    if any(wanted):
        stride, padding, dilation, groups = form.geometry
        found[form.source], found[form.weight], _ = torch.ops.aten.convolution_backward(
            *(grad, values[form.source], values[form.weight]),
            *(None, stride, padding, dilation, False, [0], groups, wanted),
        )
    if form.bias is not None and needed[form.bias]:
        # In passing, convolution_backward takes three times as long for it.
        found[form.bias] = grad.movedim(1, -1).flatten(0, -2).sum(0)
    return found


def _of_product(
    form: Product, grad: Tensor, values: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(values)
    rows = grad.reshape(-1, grad.shape[-1])
    source, weight = values[form.source], values[form.weight]
    if needed[form.source]:
        found[form.source] = (rows @ weight).reshape(source.shape)
    if needed[form.weight]:
        found[form.weight] = rows.t() @ source.reshape(-1, source.shape[-1])
    if form.bias is not None and needed[form.bias]:
        found[form.bias] = rows.sum(0)
    return found


def _recomputed(
    layer: LeanLayer, grad: Tensor, operands: Sequence[Any], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of any graph: its forward pass runs again, under autograd."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_() if wanted else x for x, wanted in zip(operands, needed, strict=True)
        ]
        value = layer.compute(*leaves)
    wanted = [i for i, is_wanted in enumerate(needed) if is_wanted]
    found: list[Tensor | None] = [None] * len(operands)
    if value.requires_grad:  # not what is computed from an argmax, say
        gradients = torch.autograd.grad(value, [leaves[i] for i in wanted], grad, allow_unused=True)
        for i, gradient in zip(wanted, gradients, strict=True):
            found[i] = gradient
    return found
