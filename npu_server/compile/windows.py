"""Windows of convolutions and pools from ONNX attributes."""

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import NodeProto

from npu_server.compile.graph import Window
from npu_wire.errors import UnsupportedModel

_MAX = 1 << 16


def conv_window(node: NodeProto, kernel: tuple[int, int], size: tuple[int, int]) -> Window:
    """Window of a Conv node.

    Args:
        node: the node.
        kernel: height and width of its weight.
        size: height and width of its input.

    Raises:
        UnsupportedModel: attributes that are out of range, or a kernel that does not fit the input.
    """
    given = _attributes(node)
    if tuple(given.get("kernel_shape", kernel)) != kernel:
        raise _refuse(node, f"kernel_shape {given['kernel_shape']} contradicts the weight's {kernel}")
    return _window(node, given, kernel, size)


def pool_window(node: NodeProto, size: tuple[int, int]) -> Window:
    """Window of a MaxPool or AveragePool node.

    Raises:
        UnsupportedModel: attributes that are out of range, or a window that does not fit the input.
    """
    given = _attributes(node)
    return _window(node, given, _pair(node, given, "kernel_shape", None), size)


def _window(node: NodeProto, given: dict[str, Any], kernel: tuple[int, int], size: tuple[int, int]) -> Window:
    strides = _pair(node, given, "strides", (1, 1))
    dilations = _pair(node, given, "dilations", (1, 1))
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    auto = given.get("auto_pad", b"NOTSET").decode()
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, strides, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        pads = (begin[0], begin[1], end[0], end[1])
    elif auto == "VALID":
        pads = (0, 0, 0, 0)
    elif auto == "NOTSET":
        pads = tuple(int(n) for n in given.get("pads", (0, 0, 0, 0)))  # type: ignore[assignment]
        if len(pads) != 4 or not all(0 <= n < _MAX for n in pads):
            raise _refuse(node, f"pads {pads} must be four numbers, 0 or more")
    else:
        raise _refuse(node, f"auto_pad {auto!r} does not exist")
    overhang = [0, 0]
    for axis in (0, 1):
        padded = size[axis] + pads[axis] + pads[axis + 2]
        if padded < reach[axis]:
            raise _refuse(
                node, f"window of {reach[axis]} does not fit {padded} (axis {axis + 2}, padding included)"
            )
        rest = (padded - reach[axis]) % strides[axis]
        last_start = padded - reach[axis] - rest + strides[axis]
        # A window must begin in the input or its leading padding (ONNX and PyTorch agree on that).
        if given.get("ceil_mode", 0) and rest and last_start < size[axis] + pads[axis]:
            overhang[axis] = strides[axis] - rest
    return Window(kernel, strides, pads, dilations, (overhang[0], overhang[1]))


def _pair(node: NodeProto, given: dict[str, Any], key: str, default: Sequence[int] | None) -> tuple[int, int]:
    value = tuple(int(n) for n in given.get(key, default or ()))
    if len(value) != 2 or not all(1 <= n < _MAX for n in value):
        raise _refuse(node, f"{key} {value} must be two numbers, 1 or more")
    return value[0], value[1]


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _refuse(node: NodeProto, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"node {node.name or node.output[0]!r} ({node.op_type}): {reason}")
