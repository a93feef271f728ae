"""Windows of convolutions and pools from ONNX attributes."""

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import NodeProto

from npu_server.compile.graph import Stuffing, Window
from npu_wire.errors import UnsupportedModel

_MAX = 1 << 16


def conv_window(
    node: NodeProto, kernel_shape: tuple[int, int], size: tuple[int, int], rank: int = 2
) -> Window:
    """Window of a Conv node; of one over (N, C, L): of one row.

    Args:
        node: the node.
        kernel_shape: height and width of its weight.
        size: height and width of its input.
        rank: 2 of an image, 1 of a sequence.

    Raises:
        UnsupportedModel: attributes that are out of range, or a kernel that does not fit the input.
    """
    given = _kernel_attributes(node, kernel_shape, rank)
    return _window(node, given, kernel_shape, size)


def transposed_window(
    node: NodeProto, kernel_shape: tuple[int, int], size: tuple[int, int], rank: int = 2
) -> tuple[Window, Stuffing, tuple[int, int]]:
    """Window, stuffing and output size of a ConvTranspose node; args as of `conv_window`.

    Each input pixel adds to the outputs that its kernel reaches. Seen from an output, that is a convolution
    of stride 1 with the mirrored kernel over an input whose pixels lie `strides` apart (Dumoulin and Visin,
    "A guide to convolution arithmetic", 4.2).

    Raises:
        UnsupportedModel: attributes that are out of range.
    """
    given = _kernel_attributes(node, kernel_shape, rank)
    strides, dilations = (_pair(node, given, key, (1, 1)) for key in ("strides", "dilations"))
    extra = [int(n) for n in given.get("output_padding", (0, 0))]
    if len(extra) != 2 or not all(0 <= n < _MAX for n in extra):
        raise _refuse(node, f"output_padding {extra} must be two numbers, 0 or more")
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or "output_shape" in given:
        raise _refuse(node, "auto_pad and output_shape are not supported; give pads")
    pads = _pads(node, given)
    reach = [(k - 1) * d for k, d in zip(kernel_shape, dilations, strict=True)]
    around = [reach[i] - pads[i] for i in (0, 1)]
    around += [reach[i] - pads[i + 2] + extra[i] for i in (0, 1)]
    pixels = [(size[i] - 1) * strides[i] + 1 + around[i] + around[i + 2] - reach[i] for i in (0, 1)]
    if min(pixels) < 1:
        raise _refuse(node, f"its output would have {pixels[0]} x {pixels[1]} pixels")
    stuffing = Stuffing(strides, (around[0], around[1], around[2], around[3]))
    return Window(kernel_shape, dilations=dilations), stuffing, (pixels[0], pixels[1])


def pool_window(node: NodeProto, size: tuple[int, int], rank: int = 2) -> Window:
    """Window of a MaxPool or AveragePool node.

    Args:
        node: the node.
        size: height and width of its input; (1, length) of a sequence.
        rank: 2 of an image, 1 of a sequence.

    Raises:
        UnsupportedModel: attributes that are out of range, or a window that does not fit the input.
    """
    given = _in_two_dimensions(_attributes(node), rank)
    kernel_shape = _pair(node, given, "kernel_shape", None)
    plain = not any(given.get("pads", ())) and set(given.get("dilations", ())) <= {1}
    if given.get("ceil_mode", 0) and plain:
        # Such a window may reach beyond the input, where nothing counts: some networks pool the whole image
        # with a window of any size.
        kernel_shape = (min(kernel_shape[0], size[0]), min(kernel_shape[1], size[1]))
    return _window(node, given, kernel_shape, size)


def _kernel_attributes(node: NodeProto, kernel_shape: tuple[int, int], rank: int) -> dict[str, Any]:
    given = _in_two_dimensions(_attributes(node), rank)
    if tuple(given.get("kernel_shape", kernel_shape)) != kernel_shape:
        raise _refuse(node, f"kernel_shape {given['kernel_shape']} contradicts the weight's {kernel_shape}")
    return given


def _in_two_dimensions(given: dict[str, Any], rank: int) -> dict[str, Any]:
    """Attributes of a sequence's operator as those of an image of one row."""
    if rank != 1:
        return given
    rows = {"kernel_shape": 1, "strides": 1, "dilations": 1, "output_padding": 0}
    two = {key: [rows[key], *value] if key in rows else value for key, value in given.items()}
    if len(two.get("pads", ())) == 2:
        two["pads"] = [0, two["pads"][0], 0, two["pads"][1]]
    return two


def _pads(node: NodeProto, given: dict[str, Any]) -> tuple[int, int, int, int]:
    pads = tuple(int(n) for n in given.get("pads", (0, 0, 0, 0)))
    if len(pads) != 4 or not all(0 <= n < _MAX for n in pads):
        raise _refuse(node, f"pads {pads} must be four numbers, 0 or more")
    return pads[0], pads[1], pads[2], pads[3]


def _window(
    node: NodeProto, given: dict[str, Any], kernel_shape: tuple[int, int], size: tuple[int, int]
) -> Window:
    strides = _pair(node, given, "strides", (1, 1))
    dilations = _pair(node, given, "dilations", (1, 1))
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel_shape, dilations, strict=True))
    auto = given.get("auto_pad", b"NOTSET").decode("utf-8", "replace")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, strides, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        pads = (begin[0], begin[1], end[0], end[1])
    elif auto == "VALID":
        pads = (0, 0, 0, 0)
    elif auto == "NOTSET":
        pads = _pads(node, given)
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
    return Window(kernel_shape, strides, pads, dilations, (overhang[0], overhang[1]))


def _pair(node: NodeProto, given: dict[str, Any], key: str, default: Sequence[int] | None) -> tuple[int, int]:
    value = tuple(int(n) for n in given.get(key, default or ()))
    if len(value) != 2 or not all(1 <= n < _MAX for n in value):
        raise _refuse(node, f"{key} {value} must be two numbers, 1 or more")
    return value[0], value[1]


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _refuse(node: NodeProto, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"node {node.name or node.output[0]!r} ({node.op_type}): {reason}")
