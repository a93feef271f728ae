"""Operators: every declared one yields what the judge says, every other one is refused. No third state."""

from collections.abc import Iterable, Mapping

import numpy as np

from npu_server.conformance.graphs import OUTPUT, Case, codes, range_variants
from npu_server.conformance.judges import Judge
from npu_server.conformance.layer_maps import violations
from npu_server.conformance.report import OperatorResult, Verdict
from npu_server.conformance.targets import Target
from npu_server.conformance.trials import Trial, attempt
from npu_wire.errors import InvalidInput, UnsupportedModel
from npu_wire.layer_map import Int8Array


def try_operators(
    target: Target, judge: Judge, cases: Mapping[str, tuple[Case, ...]]
) -> tuple[list[OperatorResult], list[Trial]]:
    """Tries every operator of the table, and names the declared ones that the table does not have.

    Returns:
        Results, and what the target did, for `wire_transparency`.
    """
    declared = frozenset(target.capabilities.operators)
    results, trials = [], []
    for op in sorted(declared | cases.keys()):
        if op not in cases:
            detail = "declared, but the suite has no case for it: nothing vouches for it"
            results.append(OperatorResult(op, Verdict.FAILED, detail=detail))
        elif op in declared:
            result, done = _try_declared(target, judge, op, cases[op], declared)
            results.append(result)
            trials += done
        else:
            results.append(_try_undeclared(target, op, cases[op], declared))
    return results, trials


def _try_declared(
    target: Target, judge: Judge, op: str, cases: Iterable[Case], declared: frozenset[str]
) -> tuple[OperatorResult, list[Trial]]:
    tally, trials = _Tally(judge), []
    for case in cases:
        if not case.needs <= declared:
            tally.note(f"{case.title}: needs {', '.join(sorted(case.needs - declared))}")
            continue
        for variant, ranges in range_variants(case):
            batch = codes(case.seed, case.shape)
            try:
                trial = attempt(target, case, ranges, batch)
                trials.append(trial)
                tally.add(trial, f"{case.title}, ranges {variant}")
            except Exception as error:  # a vendor's code may raise anything, and the others still count
                tally.fail(f"{case.title}, ranges {variant}: {type(error).__name__}: {error}")
    return tally.result(op), trials


class _Tally:
    """Sums up the trials of one operator."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._cases = self._elements = self._equal = self._max_lsb = self._refused = 0
        self._failure = ""
        self._notes: list[str] = []

    def fail(self, what: str) -> None:
        """Keeps the first failure."""
        self._failure = self._failure or what

    def note(self, what: str) -> None:
        """Keeps what else there is to know, once."""
        if what not in self._notes:
            self._notes.append(what)

    def add(self, trial: Trial, title: str) -> None:
        """Compares a trial with the judge."""
        if trial.refusal is not None or trial.layer_map is None:
            self._add_refusal(trial, title)
            return
        for problem in violations(trial.layer_map, trial.layer_map.named(trial.batch), trial.outputs):
            self.fail(f"{title}: {problem}")
        if trial.layer_map.outputs != (OUTPUT,):
            self.fail(f"{title}: the outputs are {trial.layer_map.outputs}; the model's is '{OUTPUT}'")
        try:
            expected = self._judge.expect(trial)
        except UnsupportedModel:
            self.fail(f"{title}: runs what {self._judge.name} refuses, so nothing vouches for it")
            return
        except InvalidInput as error:
            self.fail(f"{title}: {error}")
            return
        self._cases += 1
        for name, codes_expected in expected.items():
            if name in trial.outputs:  # else fused away by this backend
                self._compare(name, trial.outputs[name], codes_expected, title)

    def _compare(self, name: str, got: Int8Array, expected: Int8Array, title: str) -> None:
        if got.shape != expected.shape:
            self.fail(f"{title}: '{name}' has shape {got.shape} instead of {expected.shape}")
            return
        apart = np.abs(got.astype(np.int64) - expected)
        largest = int(apart.max())
        self._elements += apart.size
        self._equal += int((apart == 0).sum())
        self._max_lsb = max(self._max_lsb, largest)
        if largest > self._judge.tolerance_lsb:
            wrong = int((apart > self._judge.tolerance_lsb).sum())
            self.fail(f"{title}: {wrong} of {apart.size} elements of '{name}' differ, by up to {largest} LSB")

    def _add_refusal(self, trial: Trial, title: str) -> None:
        problem = refusal_problem(trial)
        if problem:
            self.fail(f"{title}: {problem}")
        self._refused += 1
        if self._judge.tolerance_lsb:
            self.note(f"refused: {trial.case.title}")
            return
        try:
            self._judge.expect(trial)
        except UnsupportedModel:
            self.note(f"refused: {trial.case.title}")
        else:
            self.fail(f"{title}: refused ({trial.refusal}), though {self._judge.name} runs it")

    def result(self, op: str) -> OperatorResult:
        """The sum."""
        if not self._failure and not self._cases and self._refused:
            self._failure = "declared, but every case of it is refused"
        verdict = Verdict.FAILED if self._failure else Verdict.PASSED
        if not self._failure and not self._cases:
            verdict = Verdict.NOT_APPLICABLE
        detail = self._failure or "; ".join(self._notes)
        return OperatorResult(op, verdict, self._cases, self._elements, self._equal, self._max_lsb, detail)


def _try_undeclared(
    target: Target, op: str, cases: Iterable[Case], declared: frozenset[str]
) -> OperatorResult:
    missing: frozenset[str] = frozenset()
    tried = 0
    for case in cases:
        if not case.needs <= declared:
            missing |= case.needs - declared
            continue
        tried += 1
        _, ranges = next(iter(range_variants(case)))
        try:
            trial = attempt(target, case, ranges, codes(case.seed, case.shape))
        except Exception as error:  # as above
            detail = f"{case.title}: undeclared, and fails with {type(error).__name__}: {error}"
            return OperatorResult(op, Verdict.FAILED, detail=detail)
        problem = "runs, though it is not declared" if trial.refusal is None else refusal_problem(trial)
        if problem:
            return OperatorResult(op, Verdict.FAILED, detail=f"{case.title}: {problem}")
    if not tried:
        return OperatorResult(op, Verdict.NOT_APPLICABLE, detail=f"needs {', '.join(sorted(missing))}")
    return OperatorResult(op, Verdict.REFUSED)


def refusal_problem(trial: Trial) -> str:
    """What is wrong with a refusal: it must be `UnsupportedModel` and name node and operator."""
    error, case = trial.refusal, trial.case
    message = str(error)
    if not isinstance(error, UnsupportedModel):
        return f"refused with {type(error).__name__} ({message}) instead of UnsupportedModel"
    if case.node_name not in message or case.op not in message.replace(case.node_name, ""):
        return f"the refusal ({message}) does not name node '{case.node_name}' and operator {case.op}"
    return ""
