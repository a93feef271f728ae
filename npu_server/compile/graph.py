"""The compiler's own view of a network: operations on activations, with every constant known by name."""

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A sliding window over height and width.

    Attributes:
        kernel: (height, width).
        strides: (vertical, horizontal).
        pads: (top, left, bottom, right).
        dilations: (vertical, horizontal).
        overhang: rows and columns below and right of the padding that the last windows reach into
            (ceil_mode).
    """

    kernel: tuple[int, int]
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
            for n, k, s, d in zip(padded, self.kernel, self.strides, self.dilations, strict=True)
        ]
        return sizes[0], sizes[1]


@dataclass(frozen=True)
class Affine:
    """y = x * scale + shift for each channel (axis 1), from constants.

    Attributes:
        kind: "batch_norm" (gamma, beta, mean, variance), "add", "sub", "mul", "div" (constant on the right),
            "rsub" (constant on the left).
        values: names of the constants.
        epsilon: of the batch norm.
    """

    kind: str
    values: tuple[str, ...]
    epsilon: float = 0.0


@dataclass(frozen=True)
class Weights:
    """Where the weights of a layer come from.

    Attributes:
        weight: name of the constant; None for ones.
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


@dataclass(frozen=True)
class Conv:
    """2-D convolution; weights (out, in / groups, height, width). On a rank 2 input: one pixel."""

    weights: Weights
    window: Window
    groups: int


@dataclass(frozen=True)
class Gemm:
    """Matrix product over the last axis; weights (out, in)."""

    weights: Weights


@dataclass(frozen=True)
class Add:
    """Sum of two activations."""


@dataclass(frozen=True)
class Mul:
    """Product of two activations."""


@dataclass(frozen=True)
class Concat:
    """Activations side by side; axis counts the batch as 0."""

    axis: int


@dataclass(frozen=True)
class MaxPool:
    """Largest code in the window."""

    window: Window


@dataclass(frozen=True)
class AveragePool:
    """Average over the window; `count_pads` tells whether padding counts as elements."""

    window: Window
    count_pads: bool


@dataclass(frozen=True)
class Mean:
    """Average over height and width; rank 2 or 4 comes out."""


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same (logical) order in another shape."""


@dataclass(frozen=True)
class Pad:
    """Zeros around height and width: (top, left, bottom, right)."""

    pads: tuple[int, int, int, int]


@dataclass(frozen=True)
class Clamp:
    """min(max(x, low), high) in real numbers."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Function:
    """A function of one number: "Sigmoid", "HardSigmoid" (alpha, beta), "HardSwish", "Tanh"."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Lut:
    """A function of one activation as a table; the operations that make it up, in order."""

    steps: tuple["Operation", ...]


Kernel = (
    Conv
    | Gemm
    | Add
    | Mul
    | Concat
    | MaxPool
    | AveragePool
    | Mean
    | Reshape
    | Pad
    | Clamp
    | Affine
    | Function
    | Lut
)


@dataclass(frozen=True)
class Operation:
    """One step of the network.

    Attributes:
        output: ONNX value name.
        inputs: value names of the activations that it consumes.
        kernel: what it does.
        shape: of the output, without the batch.
        nodes: names of the ONNX nodes that it stands for.
        clamp: a fused activation.
    """

    output: str
    inputs: tuple[str, ...]
    kernel: Kernel
    shape: Shape
    nodes: tuple[str, ...]
    clamp: Clamp | None = None


@dataclass(frozen=True)
class Graph:
    """A network with one input and one output, in the order of execution."""

    input: str
    input_shape: Shape
    output: str
    operations: tuple[Operation, ...]

    def with_operations(self, operations: list[Operation]) -> "Graph":
        """The same network after a rewrite."""
        return Graph(self.input, self.input_shape, self.output, tuple(operations))

    def uses(self) -> dict[str, int]:
        """How often each activation is consumed; the network's output counts as consumed once more."""
        count = {self.output: 1}
        for operation in self.operations:
            for name in operation.inputs:
                count[name] = count.get(name, 0) + 1
        return count
