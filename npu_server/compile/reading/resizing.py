"""Which input elements a resized axis reads."""

import math

import numpy as np
from onnx import NodeProto

from npu_server.compile.graph import Neighbours
from npu_server.compile.reading.importer import Importer, attributes, refuse
from npu_server.compile.reading.views import View

_ONE = 1 << 10


def target_sizes(im: Importer, node: NodeProto, view: View) -> tuple[int, ...]:
    """ONNX shape of a Resize's output, 1 for the batch.

    Raises:
        UnsupportedModel: scales that do not lead to whole sizes, a resized batch.
    """
    given = attributes(node)
    rank = len(view.dims)
    axes = [int(a) % rank for a in given.get("axes", range(rank))]  # type: ignore[attr-defined]
    sizes_name = node.input[3] if len(node.input) > 3 else ""
    target = list(view.dims)
    if sizes_name in im.constants and given.get("keep_aspect_ratio_policy", b"stretch") == b"stretch":
        # At a batch of one, whatever part of the sizes comes from the batch.
        first, second = (value.reshape(-1).tolist() for value in im.constants[sizes_name].values)
        per_sample = [2 * a - b for a, b in zip(first, second, strict=True)]
        for axis, a, unit in zip(axes, first, per_sample, strict=True):
            target[axis] = view.dims[axis] if axis == view.axis and unit == 0 else a
        return tuple(target)
    scales = im.constant(node, 2, "scales")
    if scales is None or len(scales) != len(axes):
        raise refuse(node, "needs constant scales or sizes, one an axis, that stretch")
    for axis, scale in zip(axes, scales.tolist(), strict=True):
        size = view.dims[axis] * scale
        if not math.isfinite(size) or abs(size - round(size)) > 1e-3 or (axis == view.axis and scale != 1):
            raise refuse(node, f"{view.dims[axis]} times {scale:g} is no whole size, or changes the batch")
        target[axis] = round(size)
    return tuple(target)


def nearest_indices(node: NodeProto, size: int, target: int) -> list[int]:
    """Index of the input element for each output element (ONNX Resize, mode nearest)."""
    given = attributes(node)
    position = _positions(node, size, target)
    mode = given.get("nearest_mode", b"round_prefer_floor").decode()  # type: ignore[attr-defined]
    if mode not in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
        raise refuse(node, f"nearest_mode {mode!r} does not exist")
    rounded = {
        "floor": np.floor(position),
        "ceil": np.ceil(position),
        "round_prefer_floor": np.ceil(position - 0.5),
        "round_prefer_ceil": np.floor(position + 0.5),
    }[mode]
    indices: list[int] = np.clip(rounded, 0, size - 1).astype(np.int64).tolist()
    return indices


def linear_neighbours(node: NodeProto, size: int, target: int) -> Neighbours:
    """Neighbours and weights in 10 fractional bits (TFLite's ResizeBilinearInteger)."""
    mode = _transformation(node, size, target)
    step = (_ONE * size + target // 2) // target
    if mode == "align_corners" and target > 1:
        step = (_ONE * (size - 1) + (target - 1) // 2) // (target - 1)
    offset = step // 2 - _ONE // 2 if mode in ("half_pixel", "pytorch_half_pixel") else 0
    scaled = [i * step + offset for i in range(target)]
    lower = tuple(min(max(s, 0) // _ONE, size - 1) for s in scaled)
    upper = tuple(max(min((s + _ONE - 1) // _ONE, size - 1), 0) for s in scaled)
    return Neighbours(lower, upper, tuple(s - _ONE * low for s, low in zip(scaled, lower, strict=True)))


def _positions(node: NodeProto, size: int, target: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    out = np.arange(target, dtype=np.float64)
    mode = _transformation(node, size, target)
    if mode == "align_corners":
        return out * ((size - 1) / (target - 1) if target > 1 else 0.0)
    if mode == "asymmetric":
        return out * size / target
    return (out + 0.5) * size / target - 0.5


def _transformation(node: NodeProto, size: int, target: int) -> str:
    mode = attributes(node).get("coordinate_transformation_mode", b"half_pixel").decode()  # type: ignore[attr-defined]
    if mode not in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"):
        raise refuse(node, f"coordinate_transformation_mode {mode!r} is not an operator of the NPU")
    if mode == "pytorch_half_pixel" and target == 1 < size:
        raise refuse(node, f"{size} to 1 by {mode!r}: ONNX takes the first, torch the middle; say which")
    return str(mode)
