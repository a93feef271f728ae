"""Activation ranges: the smallest and largest value of every activation of the model over some data."""

import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from npu_wire.errors import InvalidInput, NonFiniteInput
from trainer_client.qat.capture import Captured
from trainer_client.qat.fold import value_name

Range = tuple[float, float]
DEAD_RANGE: Range = (-1.0, 1.0)
"""Range of an activation that was 0 throughout: without a scale of its own, +-1 lets it come back to life."""

_NOTHING = 1e-20  # magnitude below which an activation is 0: products of such scales are no float32 numbers

CalibrationData = Tensor | Iterable[Any]


@dataclass(frozen=True)
class RangeRule:
    """How the ranges of many batches become one.

    Attributes:
        method: "minmax": the extremes of all batches. "percentile": each batch's two percentiles, averaged
            over the batches; outliers beyond are clipped, for a finer scale. "ema": a moving average of each
            batch's extremes (Jacob et al. 2018, section 3.1).
        percentile: upper percentile, above 50 and below 100; the lower one lies as far from 0.
        momentum: share of the newest batch in the moving average, in (0, 1].

    Raises:
        InvalidInput: none of the methods, or a number beyond its bounds.
    """

    method: str = "minmax"
    percentile: float = 99.9
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in ("minmax", "percentile", "ema"):
            raise InvalidInput(f"method is {self.method!r}; choose 'minmax', 'percentile' or 'ema'")
        if not 50 < self.percentile < 100:
            raise InvalidInput(f"percentile is {self.percentile}; it must be above 50 and below 100")
        if not 0 < self.momentum <= 1:
            raise InvalidInput(f"momentum is {self.momentum}; it must be above 0 and at most 1")

    def range_of(self, value: Tensor) -> Tensor:
        """Range of one batch's values: shape (2,), on the values' device."""
        extremes = torch.stack(torch.aminmax(value))
        if self.method != "percentile" or not extremes.isfinite().all():
            return extremes
        low, high = np.percentile(value.numpy(force=True), (100 - self.percentile, self.percentile))
        # Almost all values equal: their percentiles are no range.
        return extremes.new_tensor((low, high)) if low < high else extremes

    def joined(self, ranges: Mapping[str, Range], new: Mapping[str, Range], batch: int) -> dict[str, Range]:
        """The ranges after one more batch, whose number counts from 0."""
        if not ranges or self.method == "minmax":
            return merge_ranges(ranges, new)
        share = self.momentum if self.method == "ema" else 1 / (batch + 1)
        return {
            name: (low + share * (new[name][0] - low), high + share * (new[name][1] - high))
            for name, (low, high) in ranges.items()
        }


def observe(captured: Captured, data: CalibrationData, rule: RangeRule | None = None) -> dict[str, Range]:
    """Runs data through the FP32 model (evaluation mode, no gradient) and takes every activation's range.

    Args:
        captured: the model.
        data: one batch (a tensor), or an iterable of batches: tensors, tuples of the model's inputs and more,
            or dicts of its keywords; see `Signature.flatten_batch`.
        rule: how the ranges of batches are taken and joined; None: the extremes of all data.

    Returns:
        (min, max) by ONNX value name, min < max: JSON-serialisable, and joined with `merge_ranges`. A
        constant activation's range is extended to 0; one that was 0 throughout (or as good as 0) gets
        `DEAD_RANGE`; each with a warning.

    Raises:
        InvalidInput: no data, or a batch of another shape or dtype than captured.
        NonFiniteInput: NaN or infinity in a batch or in an activation.
    """
    rule = rule or RangeRule()
    device = next((p.device for p in captured.model.parameters()), torch.device("cpu"))
    ranges: dict[str, Range] = {}
    with torch.no_grad():
        for index, batch in enumerate([data] if isinstance(data, Tensor) else data):
            call = captured.signature.flatten_batch(batch, f"calibration batch {index}")
            observer = _Observer(captured, rule)
            observer.run(*call.on(device).leaves, enable_io_processing=False)
            ranges = rule.joined(ranges, observer.take(f"calibration batch {index}"), index)
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


class _Observer(fx.Interpreter):
    """Runs the training graph and keeps the range of every float value that depends on the input."""

    def __init__(self, captured: Captured, rule: RangeRule) -> None:
        super().__init__(captured.graph)
        self._rule = rule
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
            self._extremes.append(self._rule.range_of(value))
        return value

    def take(self, what: str) -> dict[str, Range]:
        """The ranges of the run; one copy from the device for all of them."""
        lowest = torch.finfo(torch.float32).min
        # Minus infinity beside finite numbers is a mask's. No INT8 tensor has such a range: it is the host's.
        pairs = [
            (lowest if low == -math.inf and math.isfinite(high) else low, high)
            for low, high in torch.stack(self._extremes).tolist()
        ]
        for name, (low, high) in zip(self._seen, pairs, strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                only = len(self._captured.inputs) == 1
                told = "the input" if only else f"the input {name!r}"
                where = told if name in self._captured.inputs else f"the activation {name!r}"
                raise NonFiniteInput(
                    f"{what}: {where} holds NaN or infinity; clean the data, or check the weights before it"
                )
        return {name: (low, high) for name, (low, high) in zip(self._seen, pairs, strict=True)}


def _computed_from_input(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose value depends on an input and is a value of the ONNX graph, the inputs included."""
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
    dead = [name for name, bounds in ranges.items() if max(map(abs, bounds)) < _NOTHING]
    constant = [name for name, (low, high) in ranges.items() if low == high and name not in dead]
    for names, what, remedy in (
        (dead, "were 0 for", f"They get the range {DEAD_RANGE}"),
        (constant, "did not change over", "Their range reaches from 0 to their value"),
    ):
        if names:
            warnings.warn(
                f"activations that {what} all calibration data: {', '.join(names)}. {remedy}; "
                "calibrate with more data, or check whether these layers are dead.",
                stacklevel=3,
            )
    return {
        name: DEAD_RANGE if name in dead else (min(low, 0.0), max(high, 0.0)) if low == high else (low, high)
        for name, (low, high) in ranges.items()
    }
