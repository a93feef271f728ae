"""What came of comparing an engine with our backends: one operator or network, one profile, one engine."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """What came of one operator of one profile before one judge.

    Attributes:
        operator: the row.
        elements: outputs of the judge, each compared with `reference` and with `emulator`.
        mismatches: outputs that differ from either.
        worst: largest difference, in LSB.
        configurations: models (a shape, scales, zero points, weights) that the judge computed.
        exhausted: those of the configurations whose every possible input was compared: all 256 codes of a
            function of one code, all 65,536 pairs of a function of two. 0: a sample.
        refusals: why the judge did not compute a configuration -> how many of them.
    """

    operator: str
    elements: int = 0
    mismatches: int = 0
    worst: int = 0
    configurations: int = 0
    exhausted: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)

    @property
    def exhaustive(self) -> bool:
        """The operator's inputs are finite, and some configurations were compared on all of them."""
        return self.exhausted > 0

    @property
    def unjudged(self) -> str:
        """Why the judge has nothing to say, where it has not."""
        return "" if self.elements else next(iter(self.refusals), "no case")


def total(operator: str, cells: Iterable[Cell]) -> Cell:
    """Several comparisons as one."""
    cells = list(cells)
    refusals: Counter[str] = Counter()
    for cell in cells:
        refusals.update(cell.refusals)
    return Cell(
        operator,
        sum(cell.elements for cell in cells),
        sum(cell.mismatches for cell in cells),
        max((cell.worst for cell in cells), default=0),
        sum(cell.configurations for cell in cells),
        sum(cell.exhausted for cell in cells),
        dict(refusals),
    )
