"""Profile x operator x judge: how many elements were compared, how many differed."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from npu_server.numerics.profile import Profile
from npu_wire.layer_map import Int8Array

from .cases import cases
from .layers import Judge, JudgedLayer, Unjudged, our_outputs


@dataclass(frozen=True)
class Cell:
    """What came of one operator of one profile before one judge.

    Attributes:
        operator: the row.
        elements: outputs of the judge, each compared with `reference` and with `emulator`.
        mismatches: outputs that differ from either.
        worst: largest difference, in LSB.
        unjudged: why the judge has nothing to say, where it has not.
    """

    operator: str
    elements: int
    mismatches: int
    worst: int
    unjudged: str = ""


def compare(
    judged: JudgedLayer,
    inputs: list[Int8Array],
    judge: Judge,
    profile: Profile,
    answer: Int8Array | None = None,
) -> Cell:
    """Judges one layer on one input.

    Args:
        judged: the layer.
        inputs: of the layer.
        judge: the engine.
        profile: the arithmetic.
        answer: the judge's output, where it is known already.

    Raises:
        Unjudged: the judge has no such operator.
    """
    expected = (judge.run(judged, inputs) if answer is None else answer).astype(np.int64)
    differences = [np.abs(ours - expected) for ours in our_outputs(judged, inputs, profile)]
    wrong = np.logical_or.reduce([difference > 0 for difference in differences])
    worst = max(int(difference.max()) for difference in differences)
    return Cell(judged.layer.spec.op, expected.size, int(wrong.sum()), worst)


def total(operator: str, cells: Iterable[Cell]) -> Cell:
    """Several comparisons as one."""
    cells = list(cells)
    return Cell(
        operator,
        sum(cell.elements for cell in cells),
        sum(cell.mismatches for cell in cells),
        max((cell.worst for cell in cells), default=0),
    )


def judge_operator(
    operator: str, profile: Profile, judge: Judge, elements: int, seed: int = 0, attempts: int = 400
) -> Cell:
    """Judges random layers of an operator until enough elements are compared.

    Args:
        operator: of `cases.DRAWS`.
        profile: the arithmetic.
        judge: the engine.
        elements: to compare at least.
        seed: of the first case.
        attempts: cases at most; a judge may refuse some.
    """
    done: list[Cell] = []
    reason = "no case"
    for attempt, case in enumerate(cases(operator, seed)):
        if attempt == attempts or (attempt == 20 and not done):
            break
        judged = case.compile(profile)
        try:
            done.append(compare(judged, case.inputs(judged), judge, profile))
        except Unjudged as refusal:
            reason = str(refusal)
        if sum(cell.elements for cell in done) >= elements:
            break
    if not done:
        return Cell(operator, 0, 0, 0, reason)
    return total(operator, done)
