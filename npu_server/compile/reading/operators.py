"""ONNX nodes -> operations: weighted layers, pools, joins; and the table of all operators."""

import numpy as np
from onnx import ModelProto, NodeProto

from npu_server.compile import graph as g
from npu_server.compile.reading import (
    operators_elementwise,
    operators_moving,
    operators_reducing,
    operators_selecting,
)
from npu_server.compile.reading.constants import Constants
from npu_server.compile.reading.importer import Handler, HostRules, Importer, attributes, refuse
from npu_server.compile.reading.operators_elementwise import constant_operand
from npu_server.compile.reading.operators_moving import axis_of, integer
from npu_server.compile.reading.views import View
from npu_server.compile.reading.windows import conv_window, pool_window, transposed_window
from npu_server.numerics.profile import Profile
from npu_server.numerics.rules import HOST_OPERATORS
from npu_wire.errors import InvalidModel, NpuError


def _optional_name(node: NodeProto, index: int) -> str | None:
    return node.input[index] if index < len(node.input) and node.input[index] else None


def _conv(im: Importer, node: NodeProto) -> None:
    x, (channels, *size) = im.image(node)
    weight = im.constant(node, 1, "the weight")
    bias = im.constant(node, 2, "the bias")
    groups = integer(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    rank = len(im.view(node, 0).dims)
    fits = weight is not None and weight.ndim == rank and groups >= 1
    if (
        weight is None
        or not fits
        or weight.shape[0 if transposed else 1] * (1 if transposed else groups) != channels
    ):
        raise refuse(
            node,
            f"weight of shape {None if weight is None else weight.shape} does not fit {channels} channels",
        )
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    if out % groups or channels % groups:
        raise refuse(node, f"{out} output channels do not divide into {groups} groups")
    if bias is not None and bias.shape != (out,):
        raise refuse(node, f"bias of shape {bias.shape} for {out} output channels")
    kernel_shape = (weight.shape[2], weight.shape[3]) if rank == 4 else (1, weight.shape[2])
    stuffing = None
    if transposed:
        window, stuffing, pixels = transposed_window(node, kernel_shape, (size[0], size[1]), rank - 2)
    else:
        window = conv_window(node, kernel_shape, (size[0], size[1]), rank - 2)
        pixels = window.output_size(size[0], size[1])
    weights = g.Weights(node.input[1], _optional_name(node, 2), out)
    shape = (out, *pixels) if rank == 4 else (out, pixels[1])
    im.emit(node, [x], g.Conv(weights, window, groups, stuffing), shape)


def _gemm(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    given = attributes(node)
    weight = im.constant(node, 1, "the weight")
    bias = im.constant(node, 2, "the bias")
    transposed = not given.get("transB", 0)
    if given.get("transA", 0) or len(view.dims) != 2 or view.axis != 0 or weight is None or weight.ndim != 2:
        raise refuse(node, "needs (N, K) times a constant (K, M), A not transposed")
    inner, outer = weight.shape if transposed else weight.shape[::-1]
    if inner != view.dims[1] or (bias is not None and bias.shape not in _row_shapes(outer)):
        raise refuse(node, f"weight {weight.shape} or bias does not fit the input (N, {view.dims[1]})")
    alpha, beta = (float(given.get(key, 1.0)) for key in ("alpha", "beta"))  # type: ignore[arg-type]
    weights = g.Weights(node.input[1], _optional_name(node, 2), outer, transposed, alpha, beta)
    im.emit_like(node, [view.name], g.Gemm(weights), view.with_dims((view.dims[0], outer)))


def _row_shapes(width: int) -> tuple[g.Shape, ...]:
    """Shapes of what is added to each row alike."""
    return ((), (1,), (1, 1), (width,), (1, width))


def _matmul(im: Importer, node: NodeProto) -> None:
    left, right = (name in im.constants for name in node.input)
    if not left and not right:
        _matmul_of_activations(im, node)
        return
    view = im.view(node, 1 if left else 0)
    weight = im.constant(node, 0 if left else 1, "the matrix")
    assert weight is not None
    # The axis that is summed up, from the end: of the activation and of the constant.
    axis, summed = (-2, -1) if left else (-1, -2)
    rank = len(view.dims)
    free = rank + axis != view.axis and (view.axis < rank - 1 if weight.ndim == 2 else view.axis < rank - 2)
    if weight.ndim < 2 or rank < -axis or not free or weight.shape[summed] != view.dims[axis]:
        raise refuse(
            node,
            f"constant of shape {weight.shape} beside {list(view.dims)}: needs a matrix that fits, with the "
            "batch on no axis of the product",
        )
    dims = list(view.dims)
    dims[axis] = weight.shape[axis]
    if weight.ndim == 2:
        operator = g.Gemm(g.Weights(node.input[0 if left else 1], None, weight.shape[axis], right), axis)
        im.emit_like(node, [view.name], operator, view.with_dims(dims))
        return
    _matmul_by_constants(im, node, view, weight.shape, left, dims)


def _matmul_by_constants(
    im: Importer, node: NodeProto, view: View, constant: g.Shape, left: bool, dims: list[int]
) -> None:
    """A constant matrix for each head."""
    outer = View("", (*view.dims[:-2], 1, 1), view.axis, view.before, view.after)
    heads = outer.operand_shape((*constant[:-2], 1, 1), grows=True)
    if heads is None:
        raise refuse(node, f"constant of shape {constant} does not broadcast with {list(view.dims)}")
    name = node.input[0 if left else 1]
    operand = g.Operand(name, (*heads[:-2], *constant[-2:]))
    operator = g.MatMul(operand=operand, constant_first=left)
    wide = [n if i == view.axis else max(n, heads[outer.npu_axis(i)]) for i, n in enumerate(view.dims[:-2])]
    im.emit_like(node, [view.name], operator, view.with_dims([*wide, *dims[-2:]]))


def _matmul_of_activations(im: Importer, node: NodeProto) -> None:
    a, b = im.view(node, 0), im.view(node, 1)
    rank = len(a.dims)
    if rank != len(b.dims) or a.placement != b.placement or not a.axis < rank - 2:
        raise refuse(
            node, f"operands {list(a.dims)} and {list(b.dims)} must have the batch on one outer axis"
        )
    try:
        outer = np.broadcast_shapes(a.dims[:-2], b.dims[:-2])
    except ValueError:
        outer = ()
    if a.dims[-1] != b.dims[-2] or not outer:
        raise refuse(node, f"operands {list(a.dims)} and {list(b.dims)} do not fit")
    result = a.with_dims((*outer, a.dims[-2], b.dims[-1]))
    im.emit_like(node, [a.name, b.name], g.MatMul(), result)


def _batch_norm(im: Importer, node: NodeProto) -> None:
    view, given = im.view(node, 0), attributes(node)
    if not 2 <= len(view.dims) <= 4 or view.axis == 1:
        raise refuse(node, "needs (N, C), (N, C, L) or (N, C, H, W)")
    channels = view.dims[1]
    for index, what in enumerate(("scale", "bias", "mean", "variance"), 1):
        value = im.constant(node, index, what)
        if value is None or value.shape != (channels,):
            raise refuse(node, f"{what} must have one entry for each of {channels} channels")
    if given.get("training_mode", 0):
        raise refuse(node, "training mode; export the model in eval mode")
    epsilon = float(given.get("epsilon", 1e-5))  # type: ignore[arg-type]
    operator = g.Affine("batch_norm", tuple(node.input[1:5]), epsilon, axis=view.npu_axis(1))
    im.emit_like(node, [view.name], operator, view)


def _concat(im: Importer, node: NodeProto) -> None:
    moving = [i for i, name in enumerate(node.input) if name not in im.constants]
    views = {i: im.view(node, i) for i in moving}
    first = views[moving[0]]
    axis = axis_of(node, first, integer(node, "axis", 0))
    constants: list[tuple[int, g.Operand]] = []
    sizes = []
    for i, name in enumerate(node.input):
        dims = views[i].dims if i in views else im.constants.array(name).shape
        if len(dims) != len(first.dims):
            raise refuse(node, f"input {i} has {len(dims)} dimensions, others {len(first.dims)}")
        sizes.append(dims[axis])
        if i not in views:
            alike = first.with_dims([dims[axis] if a == axis else n for a, n in enumerate(first.dims)])
            constants.append((i, constant_operand(im, node, i, alike)))
    shapes = [v.dims[:axis] + v.dims[axis + 1 :] for v in views.values()]
    if len(set(shapes)) != 1 or len({v.placement for v in views.values()}) != 1:
        raise refuse(node, f"shapes {[list(v.dims) for v in views.values()]} do not join along axis {axis}")
    result = first.with_dims([sum(sizes) if i == axis else n for i, n in enumerate(first.dims)])
    operator = g.Concat(first.npu_axis(axis), tuple(constants))
    im.emit_like(node, [v.name for v in views.values()], operator, result)


def _pool(im: Importer, node: NodeProto) -> None:
    x, (channels, height, width) = im.image(node)
    if len(node.output) > 1 and node.output[1]:
        raise refuse(node, "indices are not supported")
    window = pool_window(node, (height, width), len(im.view(node, 0).dims) - 2)
    pixels = window.output_size(height, width)
    shape = (channels, *pixels) if len(im.view(node, 0).dims) == 4 else (channels, pixels[1])
    operator: g.Operator = g.MaxPool(window)
    if node.op_type == "AveragePool":
        operator = g.AveragePool(window, bool(integer(node, "count_include_pad", 0)))
    im.emit(node, [x], operator, shape)


_HANDLERS: dict[str, Handler] = {
    "AveragePool": _pool,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MaxPool": _pool,
    **operators_elementwise.HANDLERS,
    **operators_moving.HANDLERS,
    **operators_reducing.HANDLERS,
    **operators_selecting.HANDLERS,
}

OPERATORS = tuple(sorted(_HANDLERS))
"""ONNX operators on activations that the compiler knows."""


def operators_of(profile: Profile) -> tuple[str, ...]:
    """The operators that an NPU takes: all that the compiler knows but what the profile refuses."""
    refused = HOST_OPERATORS - {"Div"} - set(profile.host_float.operators)
    return tuple(op for op in OPERATORS if op not in refused)


def import_model(model: ModelProto, rules: HostRules | None = None) -> tuple[g.Graph, Constants]:
    """Operations and constants of a checked model.

    Args:
        model: the model.
        rules: what may go to the NPU's host; None: nothing.

    Raises:
        InvalidModel: a constant cannot be evaluated.
        UnsupportedModel: an operator, attribute or shape that the NPU does not have, nor its host.
    """
    importer = Importer(model, _HANDLERS, rules)
    try:
        return importer.run(), importer.constants
    except NpuError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InvalidModel(f"the model contradicts itself: {type(error).__name__}: {error}") from error
