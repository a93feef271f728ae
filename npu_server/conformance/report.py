"""Results of the suite: as a table, as JSON, as an exit status."""

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from npu_wire.device import Fingerprint


class Verdict(enum.StrEnum):
    """How something came out; what is not applicable says why in its detail."""

    PASSED = "passed"
    REFUSED = "refused"  # undeclared, and refused as it must be
    NOT_APPLICABLE = "not applicable"
    FAILED = "FAILED"


@dataclass(frozen=True)
class OperatorResult:
    """One operator.

    Attributes:
        op: ONNX operator.
        verdict: how it came out.
        cases: models times ranges that ran.
        elements: INT8 numbers compared.
        equal: of them equal to the judge's.
        max_lsb: largest difference.
        detail: the first thing that is wrong, or what else there is to know.
    """

    op: str
    verdict: Verdict
    cases: int = 0
    elements: int = 0
    equal: int = 0
    max_lsb: int = 0
    detail: str = ""


@dataclass(frozen=True)
class CheckResult:
    """One check of the contract.

    Attributes:
        route: "in process", "over gRPC".
        group: what it is about.
        name: what it demands.
        verdict: how it came out.
        detail: what is wrong.
    """

    route: str
    group: str
    name: str
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All results.

    Attributes:
        fingerprint: of the backend.
        judge: who said what operators must yield.
        exact: whether the judge knows the exact codes; otherwise results tell closeness.
        operators: one an operator.
        checks: of the contract.
    """

    fingerprint: Fingerprint
    judge: str
    exact: bool
    operators: tuple[OperatorResult, ...]
    checks: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        verdicts = [o.verdict for o in self.operators] + [c.verdict for c in self.checks]
        return Verdict.FAILED not in verdicts

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"passed": self.passed, **dataclasses.asdict(self)}

    def print(self, console: Console) -> None:
        """As tables, and below them what else there is to know and, in full, what failed."""
        mark = self.fingerprint
        title = f"{mark.backend}, profile {mark.profile} ({mark.profile_hash[:12]}), judged by {self.judge}"
        console.print(self._operator_table(title))
        console.print(self._check_table())
        refused = [o.op for o in self.operators if o.verdict is Verdict.REFUSED]
        if refused:
            console.print(f"undeclared, and refused as they must be: {', '.join(refused)}")
        for o in self.operators:
            if o.verdict is not Verdict.FAILED and o.detail:
                untried = "not tried, " if o.verdict is Verdict.NOT_APPLICABLE else ""
                console.print(f"{o.op}: {untried}{escape(o.detail)}")
        for o in self.operators:
            if o.verdict is Verdict.FAILED:
                console.print(f"[bold red]FAILED[/bold red] operator {o.op}: {escape(o.detail)}")
        for c in self.checks:
            if c.verdict is Verdict.FAILED:
                console.print(
                    f"[bold red]FAILED[/bold red] {c.route}, {c.group}: {c.name}: {escape(c.detail)}"
                )
        console.print(self._summary())

    def _summary(self) -> str:
        tried = [o for o in self.operators if o.verdict in (Verdict.PASSED, Verdict.FAILED)]
        elements, equal = sum(o.elements for o in tried), sum(o.equal for o in tried)
        failed = sum(o.verdict is Verdict.FAILED for o in tried)
        failed += sum(c.verdict is Verdict.FAILED for c in self.checks)
        missed = "mismatches" if self.exact else "not the nearest code"
        return (
            f"{len(tried)} operators tried, {elements} elements compared, {elements - equal} {missed}; "
            f"{len(self.checks)} checks; "
            + (f"[bold red]{failed} FAILED[/bold red]" if failed else "all passed")
        )

    def _operator_table(self, title: str) -> Table:
        table = Table(title=title)
        for heading in ("operator", "result"):
            table.add_column(heading, no_wrap=True)
        for heading in ("cases", "elements", "equal %" if self.exact else "nearest %", "max LSB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for o in self.operators:
            if o.verdict not in (Verdict.PASSED, Verdict.FAILED):
                continue
            share = _percent(o.equal, o.elements) if o.elements else ""
            numbers = (
                (str(o.cases), str(o.elements), share, str(o.max_lsb)) if o.elements else ("", "", "", "")
            )
            table.add_row(o.op, _coloured(o.verdict), *numbers)
        return table

    def _check_table(self) -> Table:
        """One row a demand, one column a route."""
        routes = tuple(dict.fromkeys(check.route for check in self.checks))
        verdicts: dict[tuple[str, str], dict[str, CheckResult]] = {}
        for check in self.checks:
            verdicts.setdefault((check.group, check.name), {})[check.route] = check
        table = Table(title="contract")
        table.add_column("about", no_wrap=True)
        table.add_column("demand", overflow="fold")
        for route in routes:
            table.add_column(route, no_wrap=True)
        for (group, name), found in verdicts.items():
            results = [_coloured(found[route].verdict) if route in found else "" for route in routes]
            table.add_row(group, name, *results)
        return table


def _percent(part: int, whole: int) -> str:
    """Never rounded up to 100."""
    return f"{min(100 * part / whole, 99.9999 if part < whole else 100.0):.6g}"


def _coloured(verdict: Verdict) -> str:
    style = {Verdict.PASSED: "green", Verdict.FAILED: "bold red"}.get(verdict, "dim")
    return f"[{style}]{verdict.value}[/{style}]"
