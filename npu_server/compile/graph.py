"""The compiler's own view of a network: operations on activations, with every constant known by name."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from npu_server.compile.operands import Affine as Affine
from npu_server.compile.operands import Neighbours as Neighbours
from npu_server.compile.operands import Operand as Operand
from npu_server.compile.operands import Shape as Shape
from npu_server.compile.operands import Stuffing as Stuffing
from npu_server.compile.operands import Weights as Weights
from npu_server.compile.operands import Window as Window
from npu_wire.layer_map import RawSpec


@dataclass(frozen=True)
class Conv:
    """2-D convolution; weights (out, in / groups, height, width).

    (N, C, L) counts as an image of one row, (N, C) as one pixel.

    Attributes:
        weights: where they come from; those of a transposed convolution as ONNX has them, (in, out / groups,
            height, width).
        window: the window.
        groups: of channels.
        stuffing: of a transposed convolution.
    """

    weights: Weights
    window: Window
    groups: int
    stuffing: Stuffing | None = None


@dataclass(frozen=True)
class Gemm:
    """Matrix product over one axis, which holds the outputs then; weights (out, in).

    Attributes:
        weights: where they come from.
        axis: counted from the end, so that -1 is the last one; a matrix on the left works on -2.
    """

    weights: Weights
    axis: int = -1


@dataclass(frozen=True)
class MatMul:
    """Matrix product over the last axes of two activations, or of one and a constant; axes before broadcast.

    Attributes:
        factors: what the product is multiplied by or divided by, folded into its multiplier: positive numbers
            that are not trained.
        operand: the constant; one matrix for all is a `Gemm`.
        constant_first: it is the left one.
    """

    factors: tuple[Affine, ...] = ()
    operand: Operand | None = None
    constant_first: bool = False


@dataclass(frozen=True)
class Add:
    """Sum of two activations, or of one and a constant."""

    operand: Operand | None = None


@dataclass(frozen=True)
class Sub:
    """Difference of two activations, or of one and a constant; `constant_first` tells their order then."""

    operand: Operand | None = None
    constant_first: bool = False


@dataclass(frozen=True)
class Mul:
    """Product of two activations, or of one and a constant (its reciprocal, where it divides)."""

    operand: Operand | None = None
    divides: bool = False


def beside_constant(kind: str, operand: Operand) -> Add | Sub | Mul:
    """The operator of an activation and a constant that an `Affine` of some kind stands for."""
    operators: dict[str, Add | Sub | Mul] = {
        "add": Add(operand),
        "sub": Sub(operand),
        "rsub": Sub(operand, constant_first=True),
        "mul": Mul(operand),
        "div": Mul(operand, divides=True),
    }
    return operators[kind]


@dataclass(frozen=True)
class Concat:
    """Tensors side by side; axis counts the batch as 0.

    Attributes:
        axis: along which they are joined.
        constants: position among the joined tensors -> constant; activations fill the other positions.
    """

    axis: int
    constants: tuple[tuple[int, Operand], ...] = ()


@dataclass(frozen=True)
class Extreme:
    """Largest or smallest of several tensors that broadcast; each comes to the output's scale as in Concat.

    Attributes:
        largest: Max instead of Min.
        constants: what stands beside the activations.
    """

    largest: bool
    constants: tuple[Operand, ...] = ()


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
    """Average over axes (batch = 0), height and width by default; they may stay as 1 or vanish."""

    axes: tuple[int, ...] = (2, 3)


@dataclass(frozen=True)
class Sum:
    """Sum over axes (batch = 0)."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Largest:
    """Largest code over axes (batch = 0)."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Smallest:
    """Smallest code over axes (batch = 0)."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same (logical) order in another shape."""


@dataclass(frozen=True)
class Rearrange:
    """The same elements in another order: seen as `split`, transposed, seen as the output's shape.

    Attributes:
        op: how the layer map calls it: "Transpose", "DepthToSpace", "SpaceToDepth".
        split: shape without the batch.
        order: axes of `split`, counted from 0.
    """

    op: str
    split: Shape
    order: tuple[int, ...]


@dataclass(frozen=True)
class Select:
    """Some elements along some axes, perhaps several times: out[..., i, ...] = x[..., indices[i], ...].

    Attributes:
        op: how the layer map calls it: "Slice", "Split", "Gather", "Resize", ...
        indices: (axis, indices) with batch = axis 0; axes that are not named stay as they are.
    """

    op: str
    indices: tuple[tuple[int, range | tuple[int, ...]], ...]


@dataclass(frozen=True)
class Pad:
    """Zeros around: (before, after) of each axis but the batch."""

    pads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Interpolate:
    """Bilinear resize of (N, C, H, W)."""

    rows: Neighbours
    columns: Neighbours


@dataclass(frozen=True)
class PRelu:
    """x where x >= 0, else x * slope."""

    slope: Operand


@dataclass(frozen=True)
class HostFloat:
    """What the host's CPU computes in floating point between two layers of the NPU.

    Attributes:
        op: ONNX operator; `npu_server.numerics.float_ops` defines each.
        axes: over which it normalizes (batch = 0), the last ones or a single one.
        split: shape in which it sees its input, without the batch.
        epsilon: of a normalization.
        scale: factor of a normalization's result.
        shift: summand of a normalization's result.
        affines: what follows, folded in.
        masks: what is added to its input, whose large negative numbers would leave INT8 no resolution.
        masked: shape of the input in which masks are added, without the batch.
    """

    op: str
    axes: tuple[int, ...] = ()
    split: Shape = ()
    epsilon: float = 0.0
    scale: Operand | None = None
    shift: Operand | None = None
    affines: tuple[Affine, ...] = ()
    masks: tuple[Operand, ...] = ()
    masked: Shape = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Every constant, in the order of their use."""
        own = (*self.masks, self.scale, self.shift, *(affine.operand for affine in self.affines))
        return tuple(operand for operand in own if operand is not None)


@dataclass(frozen=True)
class HostInput:
    """Something that a host part reads.

    Attributes:
        name: ONNX value name, in the part's model.
        tensor: name of the NPU's tensor, or of the raw input, that holds it.
        dims: of an NPU's tensor: ONNX shape; the axis of the batch holds what the batch is multiplied by.
        axis: of the batch; None of a raw input, which is taken as it is.
        outer: elements before the batch in the ONNX value; 0 of a raw input without one.
    """

    name: str
    tensor: str
    dims: Shape
    axis: int | None
    outer: int


@dataclass(frozen=True, eq=False)
class HostPart:
    """Operators that the NPU lacks: a float model of its own, which leads to one value.

    Attributes:
        model: ONNX, with inputs for everything below and one output.
        inputs: in the order of the operation's inputs.
        constants: names of those that derive from weights, and of large ones.
        sizes: shapes that follow from the batch: (name, shape without samples, growth with each sample).
        macs: multiplications for one sample.
        op: the operators that it runs, "Gather+LSTM".
        reason: why the NPU does not.
    """

    model: bytes
    inputs: tuple[HostInput, ...]
    constants: tuple[str, ...]
    sizes: tuple[tuple[str, Shape, Shape], ...]
    macs: int
    op: str
    reason: str


@dataclass(frozen=True)
class Clamp:
    """min(max(x, low), high) in real numbers.

    Attributes:
        low: the bound as compiled.
        high: likewise.
        low_name: of the constant that it comes from, where that may change (a trained bound: PACT).
        high_name: likewise.
    """

    low: float = -math.inf
    high: float = math.inf
    low_name: str | None = None
    high_name: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the constants that it follows."""
        return tuple(name for name in (self.low_name, self.high_name) if name is not None)

    def now(self, number: Callable[[str], float]) -> "Clamp":
        """The same with the values of now; where they cross, the upper one counts."""
        high = self.high if self.high_name is None else number(self.high_name)
        low = self.low if self.low_name is None else number(self.low_name)
        return replace(self, low=min(low, high), high=high)


@dataclass(frozen=True)
class Function:
    """A function of one number by its ONNX name; `npu_server.numerics.functions` defines each."""

    name: str
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Choose:
    """The second input where the first is true, else the third; only inside of tables."""


@dataclass(frozen=True)
class Lut:
    """A function of one activation as a table; the operations that make it up, in order."""

    steps: tuple["Operation", ...]


Operator = (
    Conv
    | Gemm
    | MatMul
    | Add
    | Sub
    | Mul
    | Concat
    | Extreme
    | MaxPool
    | AveragePool
    | Mean
    | Sum
    | Largest
    | Smallest
    | Reshape
    | Rearrange
    | Select
    | Pad
    | Interpolate
    | Clamp
    | PRelu
    | HostFloat
    | HostPart
    | Affine
    | Function
    | Choose
    | Lut
)


@dataclass(frozen=True)
class Operation:
    """One step of the network.

    Attributes:
        output: ONNX value name.
        inputs: value names of the activations that it consumes.
        operator: what it does.
        shape: of the output, without the batch.
        nodes: names of the ONNX nodes that it stands for.
        clamp: a fused activation.
        outer: elements before the batch in the ONNX value, which need not begin with it: the value's own
            order is (outer, batch, rest), the NPU's is (batch, outer, rest).
    """

    output: str
    inputs: tuple[str, ...]
    operator: Operator
    shape: Shape
    nodes: tuple[str, ...]
    clamp: Clamp | None = None
    outer: int = 1


@dataclass(frozen=True)
class Entry:
    """An input that becomes INT8: its name, and its shape without the batch."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """A network.

    Attributes:
        inputs: in the model's order; those that no operation reads as well.
        outputs: names of the activations from which the model's outputs follow, each once.
        operations: in the order of execution.
    """

    inputs: tuple[Entry | RawSpec, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def with_operations(self, operations: list[Operation]) -> "Graph":
        """The same network after a rewrite."""
        return replace(self, operations=tuple(operations))

    def uses(self) -> dict[str, int]:
        """How often each activation is consumed; each output of the network counts once more."""
        count = dict.fromkeys(self.outputs, 1)
        for operation in self.operations:
            for name in operation.inputs:
                count[name] = count.get(name, 0) + 1
        return count
