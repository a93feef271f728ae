"""What a profile claims of an engine, and what came of it."""

from dataclasses import dataclass

from npu_server.numerics.profile import load_profile

from . import engines, networks, sweeps
from .cell import Cell, total
from .matrix import judge_operator


@dataclass(frozen=True)
class Row:
    """One cell of the matrix with its place.

    Attributes:
        profile: name.
        judge: name.
        subject: an operator, or a whole network.
        cell: what came of it.
        claimed: False where the profile says that its engine computes otherwise.
        layers: of a network: how many the judge computed.
    """

    profile: str
    judge: str
    subject: str
    cell: Cell
    claimed: bool
    layers: int = 0

    @property
    def broken(self) -> bool:
        """A claim that nobody judged, or that does not hold."""
        return self.claimed and (self.cell.elements == 0 or self.cell.mismatches > 0)

    @property
    def verdict(self) -> str:
        """In one phrase."""
        cell = self.cell
        if not self.claimed:
            return f"not claimed ({cell.unjudged or f'{cell.mismatches} of {cell.elements} differ'})"
        if not cell.elements:
            return f"NOT JUDGED: {cell.unjudged}"
        layers = f" in {self.layers} layers" if self.layers else ""
        result = (
            "0 mismatches" if not cell.mismatches else f"{cell.mismatches} MISMATCHES, up to {cell.worst} LSB"
        )
        return f"{result} of {cell.elements:,}{layers}"

    def __str__(self) -> str:
        return f"{self.profile:18} {self.subject:22} {self.judge:22} {self.verdict}"


@dataclass(frozen=True)
class Extent:
    """How much is compared in a cell.

    Attributes:
        elements: of an operator's random layers: outputs at least.
        scales: of an operator that is swept over every code: scales and zero points.
        triples: of one that is swept over every pair of codes.
    """

    elements: int
    scales: int
    triples: int


def judge_claim(profile_name: str, judge_name: str, subject: str, extent: Extent) -> Row:
    """Judges one cell of the matrix: random layers, and all inputs where they are finite.

    Args:
        profile_name: a shipped profile.
        judge_name: of `engines.NAMES`.
        subject: of `cases.DRAWS` or `networks.NETWORKS`.
        extent: how much to compare.
    """
    profile = load_profile(profile_name)
    try:
        judge = engines.find(judge_name)
    except ImportError as error:
        absent = Cell(subject, refusals={f"not installed: {error}": 1})
        return Row(profile_name, judge_name, subject, absent, claimed=subject not in profile.unjudged)
    if subject in networks.NETWORKS:
        cells = list(networks.judge_network(networks.NETWORKS[subject](), profile, judge))
        return Row(profile_name, judge_name, subject, total(subject, cells), True, layers=len(cells))
    claimed = subject not in profile.unjudged
    cells = [judge_operator(subject, profile, judge, extent.elements)]
    if claimed and subject in sweeps.SWEEPS:
        pairs = any(sweep.pairs for sweep in sweeps.SWEEPS[subject])
        configurations = extent.triples if pairs else extent.scales
        cells.append(sweeps.judge_sweeps(subject, profile, judge, configurations))
    return Row(profile_name, judge_name, subject, total(subject, cells), claimed)
