"""ONNX nodes that only move data, or resize it -> operations."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from npu_server.compile import graph as g
from npu_server.compile.constants import PROBE_BATCHES
from npu_server.compile.importer import Handler, Importer, attributes, refuse
from npu_server.compile.resizing import linear_taps, nearest_indices, target_sizes
from npu_server.compile.views import View


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


def _integers(im: Importer, node: NodeProto, index: int, what: str) -> list[int] | None:
    value = im.constant(node, index, what)
    return None if value is None else [int(n) for n in value.reshape(-1)]


def _see_as(im: Importer, node: NodeProto, view: View, targets: Sequence[g.Shape]) -> None:
    """The same elements in another shape, which may be no work at all."""
    result = view.reshaped(targets)
    if result is None:
        raise refuse(node, f"target shape {targets[0]} (at batch {PROBE_BATCHES[0]}) tears the batch apart")
    if result.shape == view.shape:
        im.alias(node, result)
    else:
        im.emit(node, [view.name], g.Reshape(), result.shape, result)


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
    _see_as(im, node, view, [first, second])


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
    _see_as(im, node, view, [(math.prod(s[:axis]), math.prod(s[axis:])) for s in shapes])


def _squeeze(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axes = _integers(im, node, 1, "axes")
    ones = [i for i, n in enumerate(view.dims) if n == 1 and i != view.axis]
    gone = ones if axes is None else [axis_of(node, view, axis) for axis in axes]
    if any(view.dims[axis] != 1 for axis in gone):
        raise refuse(node, f"axes {axes} of {view.dims} are not all 1")
    _see_as(
        im,
        node,
        view,
        [tuple(n for i, n in enumerate(view.at(b)) if i not in gone) for b in PROBE_BATCHES],
    )


def _unsqueeze(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axes = _integers(im, node, 1, "axes") or []
    rank = len(view.dims) + len(axes)
    new = {axis % rank for axis in axes}
    shapes = [list(view.at(batch)) for batch in PROBE_BATCHES]
    for axis in sorted(new):
        for shape in shapes:
            shape.insert(axis, 1)
    _see_as(im, node, view, [tuple(shape) for shape in shapes])


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


def select(
    im: Importer,
    node: NodeProto,
    view: View,
    op: str,
    chosen: dict[int, Sequence[int]],
    output: str = "",
    drop: int | None = None,
) -> None:
    """Emits a selection along ONNX axes.

    Args:
        im: the importer.
        node: the node.
        view: what is selected from.
        op: name in the layer map.
        chosen: ONNX axis -> indices, in [0, size).
        output: which of the node's outputs it is.
        drop: ONNX axis of one index that vanishes.
    """
    dims = [len(chosen[i]) if i in chosen else n for i, n in enumerate(view.dims)]
    result = view.with_dims(dims)
    if drop is not None:
        left = [tuple(n for i, n in enumerate(result.at(b)) if i != drop) for b in PROBE_BATCHES]
        dropped = result.reshaped(left)
        assert dropped is not None
        result = dropped
    kept = all(list(indices) == list(range(view.dims[axis])) for axis, indices in chosen.items())
    if kept and result.shape == view.shape:
        im.alias(node, result, output)
        return
    indices = tuple((view.npu_axis(axis), tuple(values)) for axis, values in sorted(chosen.items()))
    im.emit(node, [view.name], g.Select(op, indices), result.shape, result, output)


def _slice(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    starts, ends, axes, steps = (
        _integers(im, node, i, w) for i, w in ((1, "starts"), (2, "ends"), (3, "axes"), (4, "steps"))
    )
    assert starts is not None
    assert ends is not None
    axes = list(range(len(starts))) if axes is None else axes
    chosen: dict[int, Sequence[int]] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        rank = len(view.dims)
        if axis % rank == view.axis and (start, step) == (0, 1) and end >= 2**31 - 1:
            continue
        axis = axis_of(node, view, axis)
        size = view.dims[axis]
        chosen[axis] = range(size)[slice(start, end if end > -(2**31) else None, step)]
    select(im, node, view, "Slice", chosen)


def _split_points(im: Importer, node: NodeProto, view: View, axis: int, pieces: int) -> list[range]:
    sizes = im.constant(node, 1, "split")
    total = view.dims[axis]
    if sizes is None:
        width = -(-total // pieces)
        lengths = [min(width, total - i * width) for i in range(pieces)]
    elif sizes.ndim == 0:
        width = int(sizes)
        lengths = [min(width, total - i) for i in range(0, total, max(width, 1))]
    else:
        lengths = [int(n) for n in sizes]
    if sum(lengths) != total or any(n < 1 for n in lengths):
        raise refuse(node, f"pieces {lengths} do not make up {total}")
    edges = np.cumsum([0, *lengths]).tolist()
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _split(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axis = axis_of(node, view, integer(node, "axis", 0))
    pieces = _split_points(im, node, view, axis, len(node.output))
    for output, piece in zip(node.output, pieces, strict=True):
        if output:
            select(im, node, view, "Split", {axis: piece}, output)


def _split_to_sequence(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axis = axis_of(node, view, integer(node, "axis", 0))
    count = view.dims[axis] if len(node.input) < 2 or not node.input[1] else 0
    pieces = _split_points(im, node, view, axis, count)
    squeezed = count > 0 and not integer(node, "keepdims", 1)
    im.sequences[node.output[0]] = [(view, axis, piece, squeezed) for piece in pieces]


def _sequence_at(im: Importer, node: NodeProto) -> None:
    sequence = im.sequences.get(node.input[0])
    index = _integers(im, node, 1, "the position")
    if sequence is None or not index or not -len(sequence) <= index[0] < len(sequence):
        raise refuse(node, "needs a sequence of the NPU and a position in it")
    view, axis, piece, squeezed = sequence[index[0]]
    select(im, node, view, "Split", {axis: piece}, drop=axis if squeezed else None)


def _gather(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axis = axis_of(node, view, integer(node, "axis", 0))
    value = im.constant(node, 1, "the indices")
    size = view.dims[axis]
    if value is None or value.ndim > 1 or not ((value >= -size) & (value < size)).all():
        raise refuse(node, f"indices must be constant, one or a list of them, within {size}")
    indices = [int(n) % size for n in value.reshape(-1)]
    select(im, node, view, "Gather", {axis: indices}, drop=axis if value.ndim == 0 else None)


def _expand(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    if node.input[1] not in im.constants:
        raise refuse(node, "the target shape must be constant")
    wanted = im.constants[node.input[1]].values
    targets = [tuple(int(n) for n in value.reshape(-1)) for value in wanted]
    try:
        shapes = [np.broadcast_shapes(view.at(b), t) for b, t in zip(PROBE_BATCHES, targets, strict=True)]
    except ValueError:
        shapes = []
    if not shapes or len(shapes[0]) != len(view.dims) or shapes[0][view.axis] != view.at(2)[view.axis]:
        raise refuse(node, f"{view.dims} does not expand to {targets[0]} without touching the batch")
    grown = [i for i, n in enumerate(view.dims) if i != view.axis and shapes[0][i] != n]
    select(im, node, view, "Expand", {i: [0] * shapes[0][i] for i in grown})


def _tile(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    repeats = _integers(im, node, 1, "repeats")
    if repeats is None or len(repeats) != len(view.dims) or repeats[view.axis] != 1 or min(repeats) < 1:
        raise refuse(node, f"repeats {repeats} must be 1 or more, and 1 for the batch")
    chosen = {i: list(range(view.dims[i])) * n for i, n in enumerate(repeats) if n > 1}
    select(im, node, view, "Tile", chosen)  # type: ignore[arg-type]


def _pad(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    pads, value, axes = (im.constant(node, i, w) for i, w in ((1, "pads"), (2, "the value"), (3, "axes")))
    mode = attributes(node).get("mode", b"constant")
    rank = len(view.dims)
    which = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    if pads is None or len(pads) != 2 * len(which):
        raise refuse(node, f"pads for {len(which)} axes must be twice as many")
    sides = {axis: (int(pads[i]), int(pads[i + len(which)])) for i, axis in enumerate(which)}
    if sides.get(view.axis, (0, 0)) != (0, 0) or any(n < 0 for pair in sides.values() for n in pair):
        raise refuse(node, "the NPU pads by 0 or more, and never the batch")
    sides = {axis: pair for axis, pair in sides.items() if pair != (0, 0)}
    if mode in (b"reflect", b"edge"):
        chosen = {axis: _mirrored(node, view.dims[axis], pair, mode) for axis, pair in sides.items()}
        select(im, node, view, "Pad", chosen)  # type: ignore[arg-type]
        return
    if mode != b"constant" or (value is not None and value.size and float(value.reshape(-1)[0]) != 0):
        raise refuse(node, "the NPU pads with the constant 0, edges or reflections only")
    result = view.with_dims([n + sum(sides.get(i, (0, 0))) for i, n in enumerate(view.dims)])
    widths = [(0, 0)] * len(view.shape)
    for axis, pair in sides.items():
        widths[view.npu_axis(axis) - 1] = pair
    im.emit(node, [view.name], g.Pad(tuple(widths)), result.shape, result)


def _mirrored(node: NodeProto, size: int, pair: tuple[int, int], mode: object) -> list[int]:
    if mode == b"reflect" and max(pair) >= size:
        raise refuse(node, f"reflects {max(pair)} of {size} elements")
    indices: list[int] = np.pad(
        np.arange(size), pair, mode="reflect" if mode == b"reflect" else "edge"
    ).tolist()
    return indices


def _resize(im: Importer, node: NodeProto) -> None:
    x, (channels, *size) = im.image(node)
    view = im.view(node, 0)
    given = attributes(node)
    target = target_sizes(im, node, view)
    if target[1] != channels or given.get("antialias", 0):
        raise refuse(node, "the NPU resizes height and width only, without antialias")
    mode = given.get("mode", b"nearest")
    if mode == b"nearest":
        axes = range(2, len(target))
        select(im, node, view, "Resize", {a: nearest_indices(node, view.dims[a], target[a]) for a in axes})
    elif mode == b"linear":
        rows, columns = (1, target[2]) if len(target) == 3 else target[2:]
        kernel = g.Interpolate(linear_taps(node, size[0], rows), linear_taps(node, size[1], columns))
        im.emit(node, [x], kernel, target[1:])
    else:
        raise refuse(node, f"mode {mode!r} is not an operator of the NPU; nearest and linear are")


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
        kernel = g.Rearrange(node.op_type, (*split, height, width), order)
        im.emit(node, [x], kernel, (depth, height * block, width * block))
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
    if node.op_type == "Cast" and integer(node, "to", 1) != 1:
        raise refuse(node, "the NPU has no other activations than quantized float32")
    im.alias(node, im.view(node, 0))


def _is_nan(im: Importer, node: NodeProto) -> None:
    """An INT8 code always stands for a number (attention code asks that about its softmax)."""
    im.view(node, 0)
    im.constants.put(node.output[0], np.zeros(1, np.bool_))


HANDLERS: dict[str, Handler] = {
    "Cast": _cast,
    "CastLike": _cast,
    "DepthToSpace": _depth_to_space,
    "Dropout": _identity,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "IsNaN": _is_nan,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "SequenceAt": _sequence_at,
    "Slice": _slice,
    "SpaceToDepth": _depth_to_space,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
