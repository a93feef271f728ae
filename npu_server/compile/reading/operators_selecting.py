"""ONNX nodes that take some elements, some of them perhaps several times, or resize -> operations."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto

from npu_server.compile import graph as g
from npu_server.compile.reading.constants import PROBE_BATCHES
from npu_server.compile.reading.importer import (
    Handler,
    Importer,
    Piece,
    attributes,
    refuse,
)
from npu_server.compile.reading.inputs import MAX_ACTIVATION_ELEMENTS
from npu_server.compile.reading.operators_moving import axis_of, integer, integers, see_as
from npu_server.compile.reading.resizing import linear_neighbours, nearest_indices, target_sizes
from npu_server.compile.reading.views import View


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
    kept = all(_is_everything(indices, view.dims[axis]) for axis, indices in chosen.items())
    if kept and result.shape == view.shape:
        im.alias(node, result, output)
        return
    # A range stays one: written down, the indices of a long axis would take gigabytes.
    indices = tuple(
        (view.npu_axis(axis), values if isinstance(values, range) else tuple(values))
        for axis, values in sorted(chosen.items())
    )
    im.emit(node, [view.name], g.Select(op, indices), result.shape, result, output)


def _is_everything(indices: Sequence[int], size: int) -> bool:
    if isinstance(indices, range):
        return indices == range(size)
    return list(indices) == list(range(size))


def _check_size(node: NodeProto, dims: Sequence[int]) -> None:
    """Refuses what is too large before indices are written down for all of it."""
    if math.prod(dims) > MAX_ACTIVATION_ELEMENTS:
        raise refuse(node, f"its output would have shape {list(dims)}")


def _slice(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    starts, ends, axes, steps = (
        integers(im, node, i, w) for i, w in ((1, "starts"), (2, "ends"), (3, "axes"), (4, "steps"))
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


def _split_points(im: Importer, node: NodeProto, total: int, pieces: int) -> list[range]:
    sizes = im.constant(node, 1, "split")
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


def _split_source(im: Importer, node: NodeProto) -> tuple[View | str, int, int]:
    """What is split, the axis and its size: an activation, or a constant (fused weights of attention)."""
    axis = integer(node, "axis", 0)
    if node.input[0] in im.constants:
        shape = im.constants.array(node.input[0]).shape
        if not -len(shape) <= axis < len(shape):
            raise refuse(node, f"axis {axis} does not exist in {len(shape)} dimensions")
        return node.input[0], axis % len(shape), shape[axis]
    view = im.view(node, 0)
    axis = axis_of(node, view, axis)
    return view, axis, view.dims[axis]


def _cut(im: Importer, node: NodeProto, piece: Piece, output: str) -> None:
    source, axis, indices, squeezed = piece
    if isinstance(source, View):
        select(im, node, source, "Split", {axis: indices}, output, axis if squeezed else None)
        return
    picked = f"{output}/indices"
    whole = np.array(indices.start) if squeezed else np.arange(indices.start, indices.stop)
    im.constants.put(picked, whole)
    gather = onnx.helper.make_node("Gather", [source, picked], [output], node.name, axis=axis)
    im.constants.fold(gather, lambda name, batch: None)


def _split(im: Importer, node: NodeProto) -> None:
    source, axis, total = _split_source(im, node)
    pieces = _split_points(im, node, total, len(node.output))
    for output, piece in zip(node.output, pieces, strict=True):
        if output:
            _cut(im, node, (source, axis, piece, False), output)


def _split_to_sequence(im: Importer, node: NodeProto) -> None:
    source, axis, total = _split_source(im, node)
    count = total if len(node.input) < 2 or not node.input[1] else 0
    pieces = _split_points(im, node, total, count)
    squeezed = count > 0 and not integer(node, "keepdims", 1)
    im.sequences[node.output[0]] = [(source, axis, piece, squeezed) for piece in pieces]


def _sequence_at(im: Importer, node: NodeProto) -> None:
    sequence = im.sequences.get(node.input[0])
    index = integers(im, node, 1, "the position")
    if sequence is None or not index or not -len(sequence) <= index[0] < len(sequence):
        raise refuse(node, "needs a sequence of the NPU and a position in it")
    _cut(im, node, sequence[index[0]], node.output[0])


def _gather(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    axis = axis_of(node, view, integer(node, "axis", 0))
    value = im.constant(node, 1, "the indices")
    size = view.dims[axis]
    if value is None or not ((value >= -size) & (value < size)).all():
        raise refuse(node, f"indices must be constant, within {size}")
    _check_size(node, [*view.dims[:axis], value.size, *view.dims[axis + 1 :]])
    indices = [int(n) % size for n in value.reshape(-1)]
    if value.ndim < 2:
        select(im, node, view, "Gather", {axis: indices}, drop=axis if value.ndim == 0 else None)
        return
    taken = f"{node.output[0]}/taken"
    select(im, node, view, "Gather", {axis: indices}, taken)
    chosen = im.named(taken)
    shapes = [chosen.at(batch) for batch in PROBE_BATCHES]
    see_as(im, node, chosen, [(*s[:axis], *value.shape, *s[axis + 1 :]) for s in shapes])


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
    _check_size(node, shapes[0])
    grown = [i for i, n in enumerate(view.dims) if i != view.axis and shapes[0][i] != n]
    select(im, node, view, "Expand", {i: [0] * shapes[0][i] for i in grown})


def _tile(im: Importer, node: NodeProto) -> None:
    view = im.view(node, 0)
    repeats = integers(im, node, 1, "repeats")
    if repeats is None or len(repeats) != len(view.dims) or repeats[view.axis] != 1 or min(repeats) < 1:
        raise refuse(node, f"repeats {repeats} must be 1 or more, and 1 for the batch")
    _check_size(node, [size * n for size, n in zip(view.dims, repeats, strict=True)])
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
    _check_size(node, target[1:])
    mode = given.get("mode", b"nearest")
    if mode == b"nearest":
        axes = range(2, len(target))
        select(im, node, view, "Resize", {a: nearest_indices(node, view.dims[a], target[a]) for a in axes})
    elif mode == b"linear":
        rows, columns = (1, target[2]) if len(target) == 3 else target[2:]
        operator = g.Interpolate(
            linear_neighbours(node, size[0], rows), linear_neighbours(node, size[1], columns)
        )
        im.emit(node, [x], operator, target[1:])
    else:
        raise refuse(node, f"mode {mode!r} is not an operator of the NPU; nearest and linear are")


HANDLERS: dict[str, Handler] = {
    "Expand": _expand,
    "Gather": _gather,
    "Pad": _pad,
    "Resize": _resize,
    "SequenceAt": _sequence_at,
    "Slice": _slice,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "Tile": _tile,
}
