"""A trial: what a target made of a case."""

from dataclasses import dataclass, field

from npu_server.conformance.graphs import Case
from npu_server.conformance.targets import Target, run_all
from npu_server.seam import Ranges
from npu_wire.errors import NpuError
from npu_wire.layer_map import Int8Array, LayerMap


@dataclass(frozen=True)
class Trial:
    """What a target made of a case: outputs, or a refusal.

    Attributes:
        case: the model.
        ranges: that it was compiled with.
        batch: the input.
        layer_map: of the program; None where it was refused.
        outputs: of all layers by name.
        refusal: the error.
    """

    case: Case
    ranges: Ranges
    batch: Int8Array
    layer_map: LayerMap | None = None
    outputs: dict[str, Int8Array] = field(default_factory=dict)
    refusal: NpuError | None = None


def attempt(target: Target, case: Case, ranges: Ranges, batch: Int8Array) -> Trial:
    """Compiles and runs a case."""
    try:
        compiled = target.compile(case.model(), ranges)
    except NpuError as error:
        return Trial(case, ranges, batch, refusal=error)
    try:
        return Trial(case, ranges, batch, compiled.layer_map, run_all(compiled, batch.copy()))
    finally:
        compiled.close()
