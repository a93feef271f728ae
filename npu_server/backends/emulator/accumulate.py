"""Registers that saturate on every multiplication, in the order that `AccumulatorRule` defines (numba)."""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import torch

from npu_server.compile.graph import Conv, Window
from npu_server.compile.planning.lowering import Layer
from npu_server.numerics.rules import AccumulatorRule
from npu_server.numerics.scales import QuantizedWeights

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Register:
    """Weights and bias of a layer whose register may saturate on the way to its sum.

    Attributes:
        weights: shape (groups, height, width, in / groups, out / groups): the order of the additions.
        bias: shape (groups, out / groups).
        limit: the register holds [-limit, limit - 1]; int32 arrays below 2^31, else int64.
        window: how the weights move over an image.
    """

    weights: npt.NDArray[np.signedinteger]
    bias: npt.NDArray[np.signedinteger]
    limit: int
    window: Window


def pack_register(layer: Layer, weights: QuantizedWeights, rule: AccumulatorRule) -> Register:
    """Brings the weights of a Conv or Gemm layer into the order of the additions."""
    operator, codes = layer.operator, weights.codes
    groups, window = (operator.groups, operator.window) if isinstance(operator, Conv) else (1, Window((1, 1)))
    codes = codes.reshape(*codes.shape[:2], *window.size)
    grouped = codes.reshape(groups, len(codes) // groups, *codes.shape[1:])
    # A product is below 2^15: a register of 31 bits and one product fit into int32.
    number = np.int32 if rule.bits < 32 else np.int64
    return Register(
        np.ascontiguousarray(grouped.transpose(0, 3, 4, 2, 1), number),
        weights.bias.reshape(groups, -1).astype(number),
        1 << (rule.bits - 1),
        window,
    )


def saturating_sums(register: Register, image: torch.Tensor, zero_point: int) -> torch.Tensor:
    """What the registers hold at the end.

    Args:
        register: of the layer.
        image: int8 (N, H, W, C); rows of a fully connected layer as images of one pixel.
        zero_point: of the image.

    Returns:
        int32 or int64 (N, output H, output W, out), the bias included, on the image's device.
    """
    window = register.window
    top, left, bottom, right = window.pads
    centred = image.cpu().numpy().astype(register.weights.dtype) - zero_point
    padded = np.pad(centred, ((0, 0), (top, bottom), (left, right), (0, 0)))
    size = window.output_size(image.shape[1], image.shape[2])
    sums = np.empty((len(image), *size, register.bias.size), register.weights.dtype)
    steps = (window.strides, window.dilations)
    _accumulate(padded, register.weights, register.bias, *steps, register.limit, sums)
    return torch.from_numpy(sums).to(image.device)


@numba.njit(nogil=True, cache=True)
def _accumulate(x, weights, bias, strides, dilations, limit, sums):  # type: ignore[no-untyped-def]
    groups, height, width, channels, outputs = weights.shape
    low, high = weights.dtype.type(-limit), weights.dtype.type(limit - 1)
    for n in range(sums.shape[0]):
        for i in range(sums.shape[1]):
            for j in range(sums.shape[2]):
                register = sums[n, i, j].reshape(groups, outputs)
                register[:] = bias
                for a in range(height):
                    for b in range(width):
                        pixel = x[n, i * strides[0] + a * dilations[0], j * strides[1] + b * dilations[1]]
                        for c in range(channels):
                            for g in range(groups):
                                value = pixel[g * channels + c]
                                row, column = register[g], weights[g, a, b, c]
                                for o in range(outputs):
                                    row[o] = min(max(row[o] + value * column[o], low), high)
