"""The verdicts as a page of the documentation, and what is wrong with one of them."""

from collections.abc import Mapping, Sequence

from .killers import KILLERS, witness_of
from .mutants import Mutant
from .run import Verdict


def complaint(mutant: Mutant, verdict: Verdict) -> str:
    """Why a verdict cannot stand; empty where it can."""
    if verdict.outcome == "broken":
        return f"no killer could run: {verdict.detail}"
    if verdict.outcome == "killed":
        if mutant.survives:
            return "is listed as a survivor, but is caught; remove its reason"
        if mutant.named and verdict.error != "AssertionError":
            return f"must be caught by a wrong value, not by {verdict.error}: {verdict.detail}"
        return ""
    if mutant.named:
        return "must be caught by an engine or a value calculated by hand"
    return "" if mutant.survives else "nobody notices: write a killer, or a reason why none can be"


def markdown(mutants: Sequence[Mutant], verdicts: Mapping[str, Verdict]) -> str:
    """The page `docs/mutations.md`."""
    survivors = [mutant for mutant in mutants if verdicts[mutant.id].outcome != "killed"]
    lines = [
        "# Mutations",
        "",
        "Written by `make mutations`. Each mutant is one small error in the arithmetic, the compiler or a",
        "backend, put into a copy of the tree; then run the tests in which somebody else computed the value",
        "(`tests/mutations/killers.py`), until one fails. Golden vectors and comparisons of our two backends",
        "with each other do not count. The first eight are errors that nobody noticed once.",
        "",
        f"**{len(mutants)} mutants, {len(mutants) - len(survivors)} caught.**",
        "",
        "| mutant | file | what it breaks | caught by | whose value |",
        "|---|---|---|---|---|",
    ]
    for mutant in sorted(mutants, key=lambda mutant: not mutant.named):
        verdict = verdicts[mutant.id]
        if verdict.outcome == "killed":
            test = f"`{verdict.test.removeprefix('tests/')}`" + _how(verdict)
            lines.append(_row(mutant.id, f"`{mutant.file}`", mutant.breaks, test, witness_of(verdict.test)))
    lines += ["", "## Survivors", ""]
    for mutant in survivors:
        lines += [f"- `{mutant.id}` (`{mutant.file}`): {mutant.breaks}. {mutant.survives}"]
    lines += ["", "## Killers", "", "In this order, those first whose name a mutant hints at:", ""]
    lines += [f"- `{killer.select}`: {killer.witness}" for killer in KILLERS]
    return "\n".join(lines) + "\n"


def _how(verdict: Verdict) -> str:
    return "" if verdict.error == "AssertionError" else f" ({verdict.error})"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
