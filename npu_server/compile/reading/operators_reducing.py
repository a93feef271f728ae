"""ONNX nodes that reduce or normalize over axes, and those that the host computes in float -> operations."""

from onnx import NodeProto

from npu_server.compile import graph as g
from npu_server.compile.reading.importer import Handler, Importer, attributes, refuse
from npu_server.compile.reading.operators_moving import axis_of, integer
from npu_server.compile.reading.views import View


def _reduce(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    given = attributes(node)
    wanted = im.constant(node, 1, "axes")
    axes = given.get("axes", []) if wanted is None else wanted.reshape(-1).tolist()
    if not axes and given.get("noop_with_empty_axes", 0):
        im.alias(node, view)
        return
    _emit_reduction(im, node, view, sorted({axis_of(node, view, int(a)) for a in axes}))  # type: ignore[attr-defined]


def _global(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    im.image(node)
    _emit_reduction(im, node, view, list(range(2, len(view.dims))))


def _emit_reduction(im: Importer, node: NodeProto, view: View, axes: list[int]) -> None:
    if not axes:
        raise refuse(node, "axes must be named; the NPU does nothing across the batch")
    keep = node.op_type.startswith("Global") or bool(integer(node, "keepdims", 1))
    npu_axes = tuple(view.npu_axis(axis) for axis in axes)
    kernels: dict[str, g.Operator] = {
        "GlobalAveragePool": g.Mean(npu_axes),
        "GlobalMaxPool": g.Largest(npu_axes),
        "ReduceMean": g.Mean(npu_axes),
        "ReduceSum": g.Sum(npu_axes),
        "ReduceMax": g.Largest(npu_axes),
        "ReduceMin": g.Smallest(npu_axes),
    }
    dims = [1 if i in axes else n for i, n in enumerate(view.dims)]
    result = view.with_dims(dims)
    if not keep:
        gone = sum(axis < view.axis for axis in axes)
        left = tuple(n for i, n in enumerate(dims) if i not in axes)
        result = View(view.name, left, view.axis - gone, view.before, view.after)
    im.emit_like(node, [view.name], kernels[node.op_type], result)


def _softmax(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axis = axis_of(node, view, integer(node, "axis", -1))
    im.emit_like(node, [view.name], g.HostFloat(node.op_type, (view.npu_axis(axis),), view.shape), view)


def _operand(im: Importer, node: NodeProto, view: View, index: int, what: str) -> g.Operand | None:
    value = im.constant(node, index, what)
    if value is None:
        return None
    shape = view.operand_shape(value.shape)
    if shape is None:
        raise refuse(node, f"{what} of shape {value.shape} does not fit {view.dims}")
    return g.Operand(node.input[index], shape)


def _layer_norm(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    rank = len(view.dims)
    first = axis_of(node, view, integer(node, "axis", -1))
    if first < view.axis or any(node.output[1:]):
        raise refuse(node, "normalizes axes behind the batch, and has one output")
    axes = tuple(view.npu_axis(axis) for axis in range(first, rank))
    epsilon = float(attributes(node).get("epsilon", 1e-5))  # type: ignore[arg-type]
    scale = _operand(im, node, view, 1, "the scale")
    shift = _operand(im, node, view, 2, "the bias") if node.op_type == "LayerNormalization" else None
    operator = g.HostFloat(node.op_type, axes, view.shape, epsilon, scale, shift)
    im.emit_like(node, [view.name], operator, view)


def _instance_norm(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    if len(shape) < 2:
        raise refuse(node, "needs (N, C, ...)")
    epsilon = float(attributes(node).get("epsilon", 1e-5))  # type: ignore[arg-type]
    operands = []
    for index, what in ((1, "the scale"), (2, "the bias")):
        value = im.constant(node, index, what)
        if value is None or value.shape != (shape[0],):
            raise refuse(node, f"{what} must have one entry for each of {shape[0]} channels")
        operands.append(g.Operand(node.input[index], (1, shape[0], *[1] * (len(shape) - 1))))
    axes = tuple(range(2, len(shape) + 1))
    operator = g.HostFloat(node.op_type, axes, shape, epsilon, scale=operands[0], shift=operands[1])
    im.emit(node, [x], operator, shape)


def _group_norm(im: Importer, node: NodeProto) -> None:
    """The ONNX operator of opset 21, with a scale and a bias a channel; the exporter decomposes torch's."""
    x, shape = im.activation(node, 0)
    groups = integer(node, "num_groups", 0)
    if len(shape) < 2 or groups < 1 or shape[0] % groups:
        raise refuse(node, f"needs (N, C, ...) with C a multiple of the {groups} groups")
    epsilon = float(attributes(node).get("epsilon", 1e-5))  # type: ignore[arg-type]
    column = (1, shape[0], *[1] * (len(shape) - 1))
    affines = []
    for index, kind in ((1, "mul"), (2, "add")):
        value = im.constant(node, index, "scale and bias")
        if value is None or value.shape != (shape[0],):
            raise refuse(node, f"scale and bias must have one entry for each of {shape[0]} channels")
        name = node.input[index]
        affines.append(g.Affine(kind, (name,), operand=g.Operand(name, column)))
    split = (groups, shape[0] // groups, *shape[1:])
    axes = tuple(range(2, len(split) + 1))
    operator = g.HostFloat(node.op_type, axes, split, epsilon, affines=tuple(affines))
    im.emit(node, [x], operator, shape)


HANDLERS: dict[str, Handler] = {
    "GlobalAveragePool": _global,
    "GlobalMaxPool": _global,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "RMSNormalization": _layer_norm,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "ReduceMin": _reduce,
    "ReduceSum": _reduce,
    "Softmax": _softmax,
}
