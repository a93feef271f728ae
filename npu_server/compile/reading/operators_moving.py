"""ONNX nodes that show the same elements in another shape or order -> operations."""

import math
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from npu_server.compile import graph as g
from npu_server.compile.reading.constants import PROBE_BATCHES
from npu_server.compile.reading.importer import Handler, Importer, attributes, refuse
from npu_server.compile.reading.views import View


def integer(node: NodeProto, key: str, default: int) -> int:
    """An integer attribute."""
    value: int = int(attributes(node).get(key, default))  # type: ignore[call-overload]
    return value


def axis_of(node: NodeProto, view: View, axis: int) -> int:
    """An ONNX axis counted from the front; refuses one that does not exist or is the batch's."""
    rank = len(view.dims)
    if not -rank <= axis < rank:
        raise refuse(node, f"axis {axis} does not exist in {rank} dimensions")
    if axis % rank == view.axis:
        raise refuse(node, "the NPU does nothing across the batch")
    return axis % rank


def integers(im: Importer, node: NodeProto, index: int, what: str) -> list[int] | None:
    """Numbers of an input that must be constant; None where it is left out."""
    value = im.constant(node, index, what)
    return None if value is None else [int(n) for n in value.reshape(-1)]


def see_as(im: Importer, node: NodeProto, view: View, targets: Sequence[g.Shape], output: str = "") -> None:
    """The same elements in another shape, which may be no work at all.

    Args:
        im: the importer.
        node: the node.
        view: the elements.
        targets: the shape at each of `PROBE_BATCHES`.
        output: which value it is; the node's by default.
    """
    result = view.reshaped(targets)
    if result is None:
        raise refuse(node, f"target shape {targets[0]} (at batch {PROBE_BATCHES[0]}) tears the batch apart")
    if result.shape == view.shape:
        im.alias(node, result, output)
    else:
        im.emit(node, [view.name], g.Reshape(), result.shape, result, output)


def _reshape(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    if node.input[1] not in im.constants:
        raise refuse(node, "the target shape must be constant")
    wanted = im.constants[node.input[1]].values
    allow_zero = bool(integer(node, "allowzero", 0))
    targets = [
        _reshaped(view.at(batch), [int(n) for n in value.reshape(-1)], allow_zero)
        for batch, value in zip(PROBE_BATCHES, wanted, strict=True)
    ]
    first, second = targets
    if first is None or second is None:
        raise refuse(node, f"target shape {wanted[0].tolist()} does not fit {view.at(PROBE_BATCHES[0])}")
    see_as(im, node, view, [first, second])


def _reshaped(shape: g.Shape, target: list[int], allow_zero: bool) -> g.Shape | None:
    sizes = [shape[i] if n == 0 and not allow_zero and i < len(shape) else n for i, n in enumerate(target)]
    total = math.prod(shape)
    known = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) == 1 and known > 0:
        sizes = [total // known if n == -1 else n for n in sizes]
    if any(n < 1 for n in sizes) or math.prod(sizes) != total:
        return None
    return tuple(sizes)


def _flatten(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axis = integer(node, "axis", 1)
    axis += len(view.dims) if axis < 0 else 0
    shapes = [view.at(batch) for batch in PROBE_BATCHES]
    see_as(im, node, view, [(math.prod(s[:axis]), math.prod(s[axis:])) for s in shapes])


def _squeeze(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axes = integers(im, node, 1, "axes")
    ones = [i for i, n in enumerate(view.dims) if n == 1 and i != view.axis]
    gone = ones if axes is None else [axis_of(node, view, axis) for axis in axes]
    if any(view.dims[axis] != 1 for axis in gone):
        raise refuse(node, f"axes {axes} of {view.dims} are not all 1")
    see_as(
        im,
        node,
        view,
        [tuple(n for i, n in enumerate(view.at(b)) if i not in gone) for b in PROBE_BATCHES],
    )


def _unsqueeze(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axes = integers(im, node, 1, "axes") or []
    rank = len(view.dims) + len(axes)
    new = {axis % rank for axis in axes}
    shapes = [list(view.at(batch)) for batch in PROBE_BATCHES]
    for axis in sorted(new):
        for shape in shapes:
            shape.insert(axis, 1)
    see_as(im, node, view, [tuple(shape) for shape in shapes])


def _transpose(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    rank = len(view.dims)
    order = [int(n) for n in attributes(node).get("perm", range(rank)[::-1])]  # type: ignore[attr-defined]
    if sorted(order) != list(range(rank)):
        raise refuse(node, f"perm {order} does not fit {rank} dimensions")
    result, pieces = view.transposed(order)
    if list(pieces) == sorted(pieces):
        im.alias(node, result)
    else:
        im.emit(node, [view.name], g.Rearrange("Transpose", view.shape, pieces), result.shape, result)


def _depth_to_space(im: Importer, node: NodeProto) -> None:
    x, shape = im.activation(node, 0)
    block = integer(node, "blocksize", 0)
    if len(shape) != 3 or block < 1:
        raise refuse(node, "needs (N, C, H, W) and a block size")
    channels, height, width = shape
    if node.op_type == "DepthToSpace":
        depth = channels // (block * block)
        if depth * block * block != channels:
            raise refuse(node, f"{channels} channels do not divide into blocks of {block} x {block}")
        outer_first = attributes(node).get("mode", b"DCR") == b"CRD"
        split = (depth, block, block) if outer_first else (block, block, depth)
        order = (0, 3, 1, 4, 2) if outer_first else (2, 3, 0, 4, 1)
        operator = g.Rearrange(node.op_type, (*split, height, width), order)
        im.emit(node, [x], operator, (depth, height * block, width * block))
        return
    if height % block or width % block:
        raise refuse(node, f"{height} x {width} does not divide into blocks of {block} x {block}")
    split = (channels, height // block, block, width // block, block)  # type: ignore[assignment]
    shape = (channels * block * block, height // block, width // block)
    im.emit(node, [x], g.Rearrange(node.op_type, split, (2, 4, 0, 1, 3)), shape)


def _identity(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    training = im.constant(node, 2, "training_mode") if node.op_type == "Dropout" else None
    if training is not None and bool(training.reshape(-1)[0]):
        raise refuse(node, "training mode; export the model in eval mode")
    im.alias(node, view)


def _cast(im: Importer, node: NodeProto) -> None:
    floats = integer(node, "to", 1) == 1 if node.op_type == "Cast" else _is_float(im, node, 1)
    if not floats:
        raise refuse(node, "the NPU has no other activations than quantized float32")
    im.alias(node, im.view(node, 0))


def _is_float(im: Importer, node: NodeProto, index: int) -> bool:
    name = node.input[index]
    if name in im.constants:
        return bool(im.constants.array(name).dtype == np.float32)
    return im.view(node, index).name not in im.comparisons


def _is_nan(im: Importer, node: NodeProto) -> None:
    """An INT8 code always stands for a number (attention code asks that about its softmax)."""
    im.view(node, 0)
    im.constants.put(node.output[0], np.zeros(1, np.bool_))


HANDLERS: dict[str, Handler] = {
    "Cast": _cast,
    "CastLike": _cast,
    "DepthToSpace": _depth_to_space,
    "Dropout": _identity,
    "Flatten": _flatten,
    "Identity": _identity,
    "IsNaN": _is_nan,
    "Reshape": _reshape,
    "SpaceToDepth": _depth_to_space,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
