"""ONNX nodes that work element by element -> operations."""

import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
from onnx import NodeProto, helper

from npu_server.compile import graph as g
from npu_server.compile.reading.constants import PROBE_BATCHES, Array
from npu_server.compile.reading.importer import Handler, Importer, attributes, refuse
from npu_server.compile.reading.operators_moving import see_as
from npu_server.compile.reading.views import View
from npu_server.numerics.functions import FUNCTIONS


def constant_operand(im: Importer, node: NodeProto, index: int, view: View, grows: bool = False) -> g.Operand:
    """A constant input as it broadcasts with an activation.

    Args:
        im: the importer.
        node: the node.
        index: of the input.
        view: the activation.
        grows: the constant may stretch axes of the activation that are 1.

    Raises:
        UnsupportedModel: shapes that do not broadcast, or samples of a batch that are not all the same.
    """
    name = node.input[index]
    if name not in im.constants:
        raise refuse(node, f"input {index} must be constant")
    constant = im.constants[name]
    shape, batch_axis = constant.values[0].shape, None
    if constant.depends_on_batch:
        batch_axis = view.axis - (len(view.dims) - len(shape))
        if batch_axis >= 0 and view.before * view.after > 1:
            return _within_batch(im, node, name, view, batch_axis)
        if batch_axis < 0 or not _repeats(constant.values, batch_axis):
            raise refuse(node, f"constant {name!r} depends on the size of the batch")
        shape = (*shape[:batch_axis], 1, *shape[batch_axis + 1 :])
    placed = view.operand_shape(shape, grows)
    if placed is None:
        raise refuse(
            node, f"constant of shape {constant.values[0].shape} does not broadcast with {list(view.dims)}"
        )
    return g.Operand(name, placed, batch_axis)


def _within_batch(im: Importer, node: NodeProto, name: str, view: View, axis: int) -> g.Operand:
    """A constant whose axis holds something for each sample (windows), the same for all of them."""
    around = im.constants[name].values[0].shape
    placed = view.operand_shape((*around[:axis], 1, *around[axis + 1 :]))
    factors = (view.before, -1, view.after)
    whole = around[axis] == view.before * PROBE_BATCHES[0] * view.after
    apart, own = f"{node.output[0]}/{name} apart", f"{node.output[0]}/{name} of a sample"
    if placed is not None and whole:
        split, first = f"{apart}/shape", f"{apart}/first"
        im.constants.put(split, np.array((*around[:axis], *factors, *around[axis + 1 :])))
        im.constants.put(first, np.array(0))
        for step in (
            helper.make_node("Reshape", [name, split], [apart]),
            helper.make_node("Gather", [apart, first], [own], axis=axis + 1),
        ):
            im.constants.fold(step, lambda name, batch: None)
        batches = (np.moveaxis(value, axis + 1, 0) for value in im.constants[apart].values)
        alike = all(bool((each == each[:1]).all()) for each in batches)
        if alike and not im.constants[own].depends_on_batch:
            beside = [n for n in (view.before, view.after) if n != 1]
            return g.Operand(own, (*placed[: 1 + view.axis], *beside, *placed[1 + view.axis + len(beside) :]))
    raise refuse(node, f"constant {name!r} depends on the size of the batch")


def _repeats(values: tuple[Array, Array], axis: int) -> bool:
    """True when the value is one sample, once for each sample of the batch."""
    if values[0].ndim != values[1].ndim:
        return False
    sample = values[0].take([0], axis=axis)
    return all(
        value.shape[axis] == batch and bool((value == sample).all())
        for batch, value in zip(PROBE_BATCHES, values, strict=True)
    )


def _binary(im: Importer, node: NodeProto) -> None:
    op = node.op_type.lower()
    constant = [name in im.constants for name in node.input]
    if not any(constant):
        _two_activations(im, node, op)
        return
    left = constant[0]
    view = im.view(node, 1 if left else 0)
    view = _lifted(im, node, view, im.constants.array(node.input[0 if left else 1]).ndim)
    if left and op == "div":
        _reciprocal(im, node, view)
        return
    operand = constant_operand(im, node, 0 if left else 1, view, grows=True)
    kind = "rsub" if left and op == "sub" else op
    result = _grown(view, [operand])
    if result != view:
        im.emit_like(node, [view.name], g.beside_constant(kind, operand), result)
        return
    if _changes_nothing(im, op, left, operand) and not im.names_first(node, view):
        im.alias(node, view)
        return
    im.emit_like(node, [view.name], g.Affine(kind, (operand.name,), operand=operand), view)


def _lifted(im: Importer, node: NodeProto, view: View, rank: int) -> View:
    """The activation with as many dimensions as a constant that has more."""
    if rank <= len(view.dims):
        return view
    ones, name = (1,) * (rank - len(view.dims)), f"{node.output[0]}/lifted"
    see_as(im, node, view, [(*ones, *view.at(batch)) for batch in PROBE_BATCHES], name)
    return im.named(name)


def _grown(view: View, operands: Sequence[g.Operand]) -> View:
    """The view after constants have stretched axes that were 1."""
    sizes = np.broadcast_shapes((1, *view.shape), *(operand.shape for operand in operands))
    dims = [n if i == view.axis else sizes[view.npu_axis(i)] for i, n in enumerate(view.dims)]
    return view.with_dims(dims)


def _changes_nothing(im: Importer, op: str, left: bool, operand: g.Operand) -> bool:
    """Factors 1 and summands 0 that the exporter leaves behind; not weights, which may change."""
    if im.constants[operand.name].parameters or (left and op == "sub"):
        return False
    neutral = 1 if op in ("mul", "div") else 0
    return bool((im.constants.array(operand.name) == neutral).all())


def _two_activations(im: Importer, node: NodeProto, op: str) -> None:
    a, b = im.view(node, 0), im.view(node, 1)
    result = _together(node, [a, b])
    if op == "add" and _is_spread(a, b):
        # A sum of float32 depends on the order, and ONNX Runtime takes the number that is spread second.
        a, b = b, a
    kernels: dict[str, g.Operator] = {
        "add": g.Add(),
        "sub": g.Sub(),
        "mul": g.Mul(),
        "div": g.HostFloat("Div", split=result.shape),
    }
    im.emit_like(node, [a.name, b.name], kernels[op], result)


def _together(node: NodeProto, views: Sequence[View]) -> View:
    """What activations broadcast to."""
    shapes = " and ".join(str(list(v.dims)) for v in views)
    if len({v.placement for v in views}) != 1:
        raise refuse(node, f"shapes {shapes} have the batch in different places")
    if len({len(v.dims) for v in views}) != 1:
        raise refuse(node, f"operands of shapes {shapes} differ in dimensions; reshape one of them")
    try:
        return views[0].with_dims(np.broadcast_shapes(*(v.dims for v in views)))
    except ValueError as error:
        raise refuse(node, f"shapes {shapes} do not broadcast") from error


def _is_spread(a: View, b: View) -> bool:
    """Whether one number of `a` meets a run of `b`, along the last axis that is more than 1 long."""
    return next((m == 1 for m, n in zip(a.dims[::-1], b.dims[::-1], strict=True) if max(m, n) > 1), False)


def _reciprocal(im: Importer, node: NodeProto, view: View) -> None:
    operand = constant_operand(im, node, 0, view)
    if im.constants[operand.name].parameters or im.constants.array(operand.name).size != 1:
        raise refuse(node, "only one fixed number may be divided by an activation")
    value = float(im.constants.array(operand.name).reshape(-1)[0])
    im.emit_like(node, [view.name], g.Function("Reciprocal", alpha=value), view)


def _is_number(value: Array | None, view: View) -> TypeGuard[Array]:
    """True for one number that does not add dimensions to the activation beside it."""
    return value is not None and value.size == 1 and value.ndim <= len(view.dims)


def _pow(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    exponent = im.constant(node, 1, "the exponent")
    if not _is_number(exponent, view) or im.constants[node.input[1]].parameters:
        raise refuse(node, "the exponent must be one fixed number")
    im.emit_like(node, [view.name], g.Function("Pow", alpha=float(exponent.reshape(-1)[0])), view)


def _clip(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    bounds = [im.constant(node, index, "the bound") for index in (1, 2)]
    if any(bound is not None and bound.size != 1 for bound in bounds):
        raise refuse(node, "a bound must be one number")
    low, high = (None if bound is None else float(bound.reshape(-1)[0]) for bound in bounds)
    names = [_trained(im, node, index) for index in (1, 2)]
    clamp = g.Clamp(-np.inf if low is None else low, np.inf if high is None else high, *names)
    if not clamp.low < clamp.high:
        raise refuse(node, f"bounds {low} and {high} leave nothing")
    im.emit_like(node, [view.name], clamp, view)


def _trained(im: Importer, node: NodeProto, index: int) -> str | None:
    """Name of an input that is there and may change."""
    name = node.input[index] if index < len(node.input) else ""
    return name if name and im.constants.array(name).size and im.constants[name].parameters else None


def _relu(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    im.emit_like(node, [view.name], g.Clamp(low=0.0), view)


def _extreme(im: Importer, node: NodeProto) -> None:
    """Max and Min: of an activation and a number a clamp (as torch.clamp arrives), else of any tensors."""
    largest = node.op_type == "Max"
    constant = [name in im.constants for name in node.input]
    view = im.view(node, constant.index(False))
    if len(constant) == 1:
        im.alias(node, view)
        return
    if len(constant) == 2 and sum(constant) == 1:
        value = im.constant(node, constant.index(True), "the bound")
        if _is_number(value, view):
            bound, name = float(value.reshape(-1)[0]), _trained(im, node, constant.index(True))
            if not math.isfinite(bound):
                raise refuse(node, "the bound must be one finite number")
            clamp = g.Clamp(low=bound, low_name=name) if largest else g.Clamp(high=bound, high_name=name)
            im.emit_like(node, [view.name], clamp, view)
            return
    views = [im.view(node, i) for i, name in enumerate(node.input) if name not in im.constants]
    result = _together(node, views)
    fixed = [i for i, name in enumerate(node.input) if name in im.constants]
    operands = [constant_operand(im, node, i, result, grows=True) for i in fixed]
    result = _grown(result, operands)
    im.emit_like(node, [v.name for v in views], g.Extreme(largest, tuple(operands)), result)


def _function(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    given = attributes(node)
    name = node.op_type
    if name == "Gelu" and given.get("approximate", b"none") == b"tanh":
        name = "GeluTanh"
    defaults = FUNCTIONS[name].defaults
    alpha, beta = (
        float(given.get(key, default))  # type: ignore[arg-type]
        for key, default in zip(("alpha", "gamma" if name == "Selu" else "beta"), defaults, strict=True)
    )
    im.emit_like(node, [view.name], g.Function(name, alpha, beta), view)


def _compare(im: Importer, node: NodeProto) -> None:
    """An activation against a number, as softplus arrives; only a table has room for it."""
    view = im.view(node, 0)
    value = im.constant(node, 1, "the right operand")
    if not _is_number(value, view):
        raise refuse(node, "compares an activation with one number only")
    im.comparisons.add(node.output[0])
    im.emit_like(node, [view.name], g.Function(node.op_type, alpha=float(value.reshape(-1)[0])), view)


def _where(im: Importer, node: NodeProto) -> None:
    if node.input[0] in im.constants:
        condition = im.constant(node, 0, "the condition")
        assert condition is not None
        chosen = 1 if condition.all() else 2
        if not (condition.all() or not condition.any()):
            _mask(im, node, condition)
            return
        view = im.view(node, chosen)
        if not _fits(im, node, view):
            raise refuse(node, f"its inputs broadcast {list(view.dims)} to another shape; expand it first")
        im.alias(node, view)
        return
    views = [im.view(node, i) for i in range(3)]
    if len({(v.dims, v.placement) for v in views}) != 1:
        raise refuse(node, "condition and values must have one shape")
    im.emit_like(node, [v.name for v in views], g.Choose(), views[0])


def _mask(im: Importer, node: NodeProto, condition: Array) -> None:
    """Attention's: what is hidden becomes a number far below zero, in front of a softmax (`fusion`)."""
    kept = 1 if node.input[1] not in im.constants else 2
    view, value = im.view(node, kept), im.constant(node, 3 - kept, "what stands elsewhere")
    if not _is_number(value, view) or not value.reshape(-1)[0] < -1e3 or not im.leads_to(node, "Softmax"):
        raise refuse(node, "a condition that differs between elements is not an operator of the NPU")
    hidden = condition if kept == 2 else ~condition
    name = f"{node.output[0]}/mask"
    im.constants.put(name, np.where(hidden, value.reshape(-1)[0], np.float32(0)))
    shape = view.operand_shape(hidden.shape)
    if shape is None:
        raise refuse(node, f"mask of shape {hidden.shape} does not broadcast with {list(view.dims)}")
    operand = g.Operand(name, shape)
    im.emit_like(node, [view.name], g.Affine("add", (name,), operand=operand), view)


def _fits(im: Importer, node: NodeProto, view: View) -> bool:
    """Whether a node's inputs broadcast to the shape of one of them, whatever the size of the batch."""
    for i, batch in enumerate(PROBE_BATCHES):
        shapes = [
            im.constants[name].values[i].shape if name in im.constants else im.view(node, j).at(batch)
            for j, name in enumerate(node.input)
        ]
        try:
            if np.broadcast_shapes(*shapes) != view.at(batch):
                return False
        except ValueError:
            return False
    return True


def _prelu(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    operand = constant_operand(im, node, 1, view)
    im.emit_like(node, [view.name], g.PRelu(operand), view)


_ONE_INPUT = frozenset(FUNCTIONS) - {"GeluTanh", "Pow", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"}

HANDLERS: dict[str, Handler] = {
    "Add": _binary,
    "Clip": _clip,
    "Div": _binary,
    "Greater": _compare,
    "GreaterOrEqual": _compare,
    "Less": _compare,
    "LessOrEqual": _compare,
    "Max": _extreme,
    "Min": _extreme,
    "Mul": _binary,
    "PRelu": _prelu,
    "Pow": _pow,
    "Relu": _relu,
    "Sub": _binary,
    "Where": _where,
    **dict.fromkeys(sorted(_ONE_INPUT), _function),
}
