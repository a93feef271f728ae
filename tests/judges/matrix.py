"""Profile x operator x judge: how many elements were compared, how many differed."""

import numpy as np

from npu_server.numerics.profile import Profile
from npu_wire.layer_map import Int8Array

from .cases import cases
from .cell import Cell, total
from .exemptions import exemption
from .layers import Judge, JudgedLayer, Unjudged, our_outputs


def compare(
    judged: JudgedLayer,
    inputs: list[Int8Array],
    judge: Judge,
    profile: Profile,
    answer: Int8Array | None = None,
    exhausted: int = 0,
) -> Cell:
    """Judges one layer on one input.

    Args:
        judged: the layer.
        inputs: of the layer.
        judge: the engine.
        profile: the arithmetic.
        answer: the judge's output, where it is known already.
        exhausted: 1 where the inputs are all that there are.

    Raises:
        Unjudged: the judge has no such operator, or the profile does not claim this of it.
    """
    why = exemption(judged, inputs, profile)
    if why:
        raise Unjudged(f"not claimed: {why}")
    expected = (judge.run(judged, inputs) if answer is None else answer).astype(np.int64)
    differences = [np.abs(ours - expected) for ours in our_outputs(judged, inputs, profile)]
    wrong = np.logical_or.reduce([difference > 0 for difference in differences])
    worst = max(int(difference.max()) for difference in differences)
    return Cell(judged.layer.spec.op, expected.size, int(wrong.sum()), worst, 1, exhausted)


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
    for attempt, case in enumerate(cases(operator, seed)):
        compared = sum(cell.elements for cell in done)
        if attempt == attempts or (attempt == 20 and not compared) or compared >= elements:
            break
        judged = case.compile(profile)
        try:
            done.append(compare(judged, case.inputs(judged), judge, profile))
        except Unjudged as refusal:
            done.append(Cell(operator, refusals={str(refusal): 1}))
    return total(operator, done)
