"""What operations are made of besides activations: windows, and constants known by name."""

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A sliding window over height and width.

    Attributes:
        size: (height, width).
        strides: (vertical, horizontal).
        pads: (top, left, bottom, right).
        dilations: (vertical, horizontal).
        overhang: rows and columns below and right of the padding that the last windows reach into
            (ceil_mode).
    """

    size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    overhang: tuple[int, int] = (0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the window yields."""
        top, left, bottom, right = self.pads
        padded = (height + top + bottom + self.overhang[0], width + left + right + self.overhang[1])
        sizes = [
            (n - (k - 1) * d - 1) // s + 1
            for n, k, s, d in zip(padded, self.size, self.strides, self.dilations, strict=True)
        ]
        return sizes[0], sizes[1]


@dataclass(frozen=True)
class Stuffing:
    """What turns a transposed convolution into a convolution: zeros between and around the input's pixels.

    Attributes:
        strides: (vertical, horizontal) distance of two input pixels.
        pads: (top, left, bottom, right); negative: rows and columns that are cut off.
    """

    strides: tuple[int, int]
    pads: tuple[int, int, int, int]


@dataclass(frozen=True)
class Neighbours:
    """Where the outputs of a linear interpolation lie along an axis.

    Attributes:
        lower: index of the left neighbour.
        upper: index of the right neighbour.
        weight: of the right neighbour, in 1/1024.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    weight: tuple[int, ...]


@dataclass(frozen=True)
class Operand:
    """A constant that stands where an activation could.

    Attributes:
        name: of the constant.
        shape: in which it broadcasts with the activation, batch (1) included.
        batch_axis: its own axis that repeats one sample over the batch (an expanded class token); None: it
            has none.
    """

    name: str
    shape: Shape
    batch_axis: int | None = None


@dataclass(frozen=True)
class Affine:
    """y = x * scale + shift from constants.

    Attributes:
        kind: "batch_norm" (gamma, beta, mean, variance of each channel), "add", "sub", "mul", "div"
            (constant on the right), "rsub" (constant on the left).
        values: names of the constants.
        epsilon: of the batch norm.
        operand: the one constant of the other kinds, as it broadcasts.
        axis: of the batch norm's channels (batch = 0).
    """

    kind: str
    values: tuple[str, ...]
    epsilon: float = 0.0
    operand: Operand | None = None
    axis: int = 1

    @property
    def per_tensor(self) -> bool:
        """True when the constant is one number."""
        return self.operand is not None and math.prod(self.operand.shape) == 1

    def is_along(self, axis: int) -> bool:
        """True when the constants vary along no axis but this one (batch = 0)."""
        if self.operand is None:
            return axis == self.axis
        return all(n == 1 for i, n in enumerate(self.operand.shape) if i != axis)


@dataclass(frozen=True)
class Weights:
    """Where the weights of a layer come from.

    Attributes:
        weight: name of the constant; None for ones, of a matrix on its diagonal.
        bias: name of the constant; None for zeros.
        transposed: the constant is (in, out) instead of (out, in).
        alpha: factor of the weight (Gemm).
        beta: factor of the bias (Gemm).
        affines: what is folded in, in this order.
        channels: output channels.
    """

    weight: str | None
    bias: str | None
    channels: int
    transposed: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    affines: tuple[Affine, ...] = ()

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of all constants that it derives from."""
        own = tuple(name for name in (self.weight, self.bias) if name is not None)
        return own + tuple(name for affine in self.affines for name in affine.values)
