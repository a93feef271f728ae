"""ONNX activations as batch-first tensors of the NPU, wherever in their shape the batch sits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from npu_server.compile.graph import Shape
from npu_server.compile.reading.constants import PROBE_BATCHES


@dataclass(frozen=True)
class View:
    """An ONNX activation and the NPU's tensor that holds it.

    Attention code moves the batch about: (T, N, C), (N * heads, T, C), (3, N, heads, T, C). The NPU's tensor
    always begins with the batch; its other axes are those of the ONNX value in their order, and the factors
    beside the batch on a shared axis are axes of their own.

    Attributes:
        name: of the NPU's tensor.
        dims: ONNX shape; the axis of the batch holds `before * after`, to be multiplied by the batch.
        axis: ONNX axis of the batch.
        before: factor of that axis outside of the batch.
        after: factor of that axis inside of the batch.
    """

    name: str
    dims: Shape
    axis: int = 0
    before: int = 1
    after: int = 1

    @property
    def shape(self) -> Shape:
        """Shape of the NPU's tensor without the batch."""
        return self.dims[: self.axis] + self._factors + self.dims[self.axis + 1 :]

    @property
    def outer(self) -> int:
        """Elements before the batch in the ONNX value's order."""
        return math.prod(self.dims[: self.axis]) * self.before

    @property
    def batch_first(self) -> bool:
        """True when ONNX value and NPU tensor have one shape."""
        return self.axis == 0 and self.before == self.after == 1

    @property
    def placement(self) -> tuple[int, int, int]:
        """Where the batch is, counted from the end, so that operands of other ranks compare."""
        return len(self.dims) - self.axis, self.before, self.after

    def at(self, batch: int) -> Shape:
        """ONNX shape for a size of the batch."""
        return tuple(n * batch if i == self.axis else n for i, n in enumerate(self.dims))

    def npu_axis(self, axis: int) -> int:
        """Axis of the NPU's tensor (batch = 0) of an ONNX axis that is not the batch's."""
        assert axis != self.axis
        return axis + 1 if axis < self.axis else axis + len(self._factors)

    def with_dims(self, dims: Sequence[int]) -> "View":
        """Other sizes on the axes that are not the batch's."""
        return replace(self, dims=tuple(dims))

    def operand_shape(self, constant: Shape, grows: bool = False) -> Shape | None:
        """Shape (1, ...) in which a constant broadcasts with the NPU's tensor; None where it cannot.

        Args:
            constant: its ONNX shape, aligned with the last axes of `dims`; 1 on the axis of the batch.
            grows: axes of the tensor that are 1 may stretch to the constant's.
        """
        aligned = (1,) * (len(self.dims) - len(constant)) + constant
        if len(aligned) != len(self.dims) or aligned[self.axis] != 1:
            return None
        pairs = [(c, n) for i, (c, n) in enumerate(zip(aligned, self.dims, strict=True)) if i != self.axis]
        if any(c not in (1, n) and not (grows and n == 1) for c, n in pairs):
            return None
        return (1, *aligned[: self.axis], *(1 for _ in self._factors), *aligned[self.axis + 1 :])

    def reshaped(self, targets: Sequence[Shape]) -> "View | None":
        """The same elements in another ONNX shape; None where the batch would be torn apart.

        Args:
            targets: the shape at each of `PROBE_BATCHES`.
        """
        first, second = targets
        moving = [i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b]
        if len(first) != len(second) or len(moving) != 1:
            return None
        axis = moving[0]
        factor, rest = divmod(first[axis], PROBE_BATCHES[0])
        outside = math.prod(first[:axis])
        if rest or factor * PROBE_BATCHES[1] != second[axis] or not outside or self.outer % outside:
            return None
        before = self.outer // outside
        if not before or factor % before:
            return None
        dims = tuple(factor if i == axis else n for i, n in enumerate(first))
        return View(self.name, dims, axis, before, factor // before)

    def transposed(self, order: Sequence[int]) -> tuple["View", tuple[int, ...]]:
        """The view after a transposition and the order of the NPU tensor's own axes (batch not counted)."""
        pieces: list[int] = []
        for axis in order:
            if axis == self.axis:
                first = self.axis
                pieces += range(first, first + len(self._factors))
            else:
                pieces.append(self.npu_axis(axis) - 1)
        dims = tuple(self.dims[axis] for axis in order)
        view = View(self.name, dims, list(order).index(self.axis), self.before, self.after)
        return view, tuple(pieces)

    @property
    def _factors(self) -> Shape:
        return tuple(n for n in (self.before, self.after) if n != 1)
