"""Activation ranges: the smallest and largest value of every activation of the model over some data."""

import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from npu_wire.errors import InvalidInput, NonFiniteInput
from trainer_client.capture import Captured
from trainer_client.fold import value_name

Range = tuple[float, float]
DEAD_RANGE: Range = (-1.0, 1.0)
"""Range of an activation that was 0 throughout: without a scale of its own, +-1 lets it come back to life."""

CalibrationData = Tensor | Iterable[Any]


def observe(captured: Captured, data: CalibrationData) -> dict[str, Range]:
    """Runs data through the FP32 model (evaluation mode, no gradient) and takes every activation's range.

    Args:
        captured: the model.
        data: one batch, or an iterable of batches or of (batch, label, ...) tuples, float32.

    Returns:
        (min, max) by ONNX value name, min < max: JSON-serialisable, and joined with `merge_ranges`. A
        constant activation's range is extended to 0; one that was 0 throughout gets `DEAD_RANGE` and a
        warning.

    Raises:
        InvalidInput: no data, or a batch of another shape or dtype than captured.
        NonFiniteInput: NaN or infinity in a batch or in an activation.
    """
    device = next((p.device for p in captured.model.parameters()), torch.device("cpu"))
    ranges: dict[str, Range] = {}
    with torch.no_grad():
        for index, batch in enumerate([data] if isinstance(data, Tensor) else data):
            x = batch if isinstance(batch, Tensor) else _first_of(batch, index)
            require_batch(captured, x, f"calibration batch {index}")
            observer = _Observer(captured)
            observer.run(x.detach().to(device))
            ranges = merge_ranges(ranges, observer.take(f"calibration batch {index}"))
    if not ranges:
        raise InvalidInput(
            "the calibration data holds no batch; give at least one, better some hundred samples"
        )
    return _widened(ranges)


def merge_ranges(a: Mapping[str, Range], b: Mapping[str, Range]) -> dict[str, Range]:
    """The union of two sets of ranges: the smaller min and the larger max of each name."""
    merged = dict(a)
    for name, (low, high) in b.items():
        known = merged.get(name, (math.inf, -math.inf))
        merged[name] = (min(known[0], low), max(known[1], high))
    return merged


def require_batch(captured: Captured, x: Tensor, what: str) -> None:
    """Checks dtype and shape.

    Raises:
        InvalidInput: names what was expected and what came.
    """
    expected = f"expected torch.float32 of shape (batch, {', '.join(map(str, captured.input_shape))})"
    if x.dtype != torch.float32 or x.ndim < 1 or tuple(x.shape[1:]) != captured.input_shape or x.shape[0] < 1:
        raise InvalidInput(
            f"{what} is {x.dtype} of shape {tuple(x.shape)}, {expected}; "
            "call prepare() again for another input shape"
        )


class _Observer(fx.Interpreter):
    """Runs the training graph and keeps min and max of every float value that depends on the input."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured.graph)
        self._captured = captured
        self._wanted = {value_name(node) for node in _computed_from_input(captured.graph.graph)}
        self._extremes: list[Tensor] = []
        self._seen: list[str] = []

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._captured.tensor(target)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if (
            value_name(n) in self._wanted
            and isinstance(value, Tensor)
            and value.is_floating_point()
            and value.numel()
        ):
            self._seen.append(value_name(n))
            self._extremes.append(torch.stack(torch.aminmax(value)))
        return value

    def take(self, what: str) -> dict[str, Range]:
        """The ranges of the run; one copy from the device for all of them."""
        pairs = torch.stack(self._extremes).tolist()
        for name, (low, high) in zip(self._seen, pairs, strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                where = "the input" if name == self._captured.input_name else f"the activation {name!r}"
                raise NonFiniteInput(
                    f"{what}: {where} holds NaN or infinity; clean the data, or check the weights before it"
                )
        return {name: (low, high) for name, (low, high) in zip(self._seen, pairs, strict=True)}


def _computed_from_input(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose value depends on the input and is a value of the ONNX graph, the input included."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        # The size of the batch alone makes no activation: a class token, expanded to it, stays a parameter.
        if node.target is torch.ops.aten.sym_size.int:
            continue
        if node.op == "placeholder" or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return [n for n in graph.nodes if n in reached and n.op != "output" and n.target is not operator.setitem]


def _widened(ranges: dict[str, Range]) -> dict[str, Range]:
    """Ranges without a zero width."""
    dead = [name for name, bounds in ranges.items() if bounds == (0.0, 0.0)]
    if dead:
        warnings.warn(
            f"activations that were 0 for all calibration data: {', '.join(dead)}. They get the range "
            f"{DEAD_RANGE}; calibrate with more data, or check whether these layers are dead.",
            stacklevel=3,
        )
    return {
        name: DEAD_RANGE
        if low == high == 0.0
        else (min(low, 0.0), max(high, 0.0))
        if low == high
        else (low, high)
        for name, (low, high) in ranges.items()
    }


def _first_of(batch: Any, index: int) -> Tensor:
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    raise InvalidInput(
        f"calibration batch {index} is a {type(batch).__name__}; "
        "give tensors, or tuples whose first item is the input"
    )
