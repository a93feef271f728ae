"""What the checks of the contract work with: a small model on a target, and two ways to demand something."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced

import numpy as np

from npu_server.conformance.graphs import Case, codes
from npu_server.conformance.targets import CompiledModel, Target
from npu_server.seam import Ranges
from npu_wire.errors import InvalidInput, NpuError
from npu_wire.layer_map import Float32Array, Int8Array


class Broken(Exception):
    """A demand is not met; the message says how."""


@dataclass(frozen=True)
class Probe:
    """What the checks work with.

    Attributes:
        target: where to compile.
        case: a model with weights that the target declares to run.
        ranges: of its activations.
        batch: its input.
        opened: models that `release` closes.
    """

    target: Target
    case: Case
    ranges: Ranges
    batch: Int8Array
    opened: list[CompiledModel] = field(default_factory=list)

    def compile(self, weights: Mapping[str, Float32Array] | None = None) -> CompiledModel:
        """The model, with other weights where given."""
        return self.compile_model(self.with_weights(weights or {}).model(), self.ranges)

    def compile_model(self, model: bytes, ranges: Ranges) -> CompiledModel:
        """Another model; `release` closes it as well."""
        compiled = self.target.compile(model, ranges)
        self.opened.append(compiled)
        return compiled

    def with_weights(self, weights: Mapping[str, Float32Array]) -> Case:
        """The case with other weights."""
        return replaced(self.case, initializers={**self.case.initializers, **weights})

    def release(self) -> None:
        """Closes all models."""
        while self.opened:
            self.opened.pop().close()

    def other_weights(self) -> dict[str, Float32Array]:
        """All weights, changed."""
        rng = np.random.default_rng(5)
        return {
            name: (array + rng.normal(0, 0.1, array.shape)).astype(np.float32)
            for name, array in self.case.weights().items()
        }

    def sparse_weights(self) -> dict[str, Float32Array]:
        """Most weights 0 and biases small: sums that stay within narrow accumulators."""
        rng = np.random.default_rng(7)
        return {
            name: array * (np.float32(0.05) if array.ndim == 1 else (rng.random(array.shape) < 0.1))
            for name, array in self.case.weights().items()
        }


def make_probe(target: Target, candidates: tuple[Case, ...], ranges_of: Callable[[Case], Ranges]) -> Probe:
    """The first of some models that a target declares to run.

    Raises:
        InvalidInput: it declares none of their operators.
    """
    declared = frozenset(target.capabilities.operators)
    for case in candidates:
        if case.needs | {case.op} <= declared:
            return Probe(target, case, ranges_of(case), codes(case.seed, case.shape))
    raise InvalidInput(
        f"the backend declares {', '.join(sorted(declared)) or 'no operators'}; the suite needs one of "
        "Conv, Gemm, MatMul to check how weights are handled"
    )


def same(got: Mapping[str, Int8Array], expected: Mapping[str, Int8Array], what: str) -> None:
    """Demands equal bits.

    Raises:
        Broken: naming the first layer that differs.
    """
    if got.keys() != expected.keys():
        raise Broken(f"{what}: layers {sorted(got.keys() ^ expected.keys())} came only once")
    for name, tensor in expected.items():
        if got[name].shape != tensor.shape:
            raise Broken(f"{what}: '{name}' has shape {got[name].shape}, before {tensor.shape}")
        wrong = int((got[name] != tensor).sum())
        if wrong:
            raise Broken(f"{what}: {wrong} of {tensor.size} elements of '{name}' differ")


def raises(expected: type[NpuError], act: Callable[[], object], what: str) -> None:
    """Demands an error of a class.

    Raises:
        Broken: it is accepted, or another class.
    """
    try:
        act()
    except expected:
        return
    except Exception as error:
        raise Broken(f"{what}: {type(error).__name__} ({error}) instead of {expected.__name__}") from error
    raise Broken(f"{what}: accepted; {expected.__name__} is due")
