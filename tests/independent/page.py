"""What was found, as docs/conformance-independent.md."""

from collections.abc import Iterable

from .comparison import JUDGES, Finding

_HEAD = """# The compiler before a second opinion

Written by `make conformance` (`python -m tests.independent --write`). The judges of
[the conformance matrix](conformance-matrix.md) are given scales, zero points, codes, pads and fused bounds
by the compiled program. Here none of that is taken from the product: `tests/independent/` folds, fuses and
quantizes float networks by [the documentation's formulas](describe-your-npu.md#what-the-compiler-computes)
with code of its own, runs each whole network in the engine, every layer on the engine's own tensor before,
and compares scales, zero points, weight codes, bias codes and the outputs of all layers with what the
compiler and both backends make of the same float network. {differences}
"""


def markdown(findings: Iterable[Finding]) -> str:
    """The page."""
    findings = list(findings)
    total = sum(len(finding.differences) for finding in findings)
    words = "**Nothing differs.**" if not total else f"**{total} differences.**"
    lines = [_HEAD.format(differences=words)]
    lines += ["| | engine | networks | layers | outputs | weight and bias codes | differences |"]
    lines += ["|---|---|---|---|---|---|---|"]
    real = list(dict.fromkeys(f.network for f in findings if not f.is_random))
    groups = [("random networks", [f for f in findings if f.is_random])]
    groups += [(name, [f for f in findings if f.network == name]) for name in real]
    for title, group in groups:
        for name in JUDGES:
            some = [finding for finding in group if finding.judge == name]
            if some:
                lines.append(_row(title, name, some))
    return "\n".join(lines) + "\n"


def _row(title: str, engine: str, findings: list[Finding]) -> str:
    sums = (sum(getattr(f, key) for f in findings) for key in ("layers", "elements", "weights"))
    differences = sum(len(f.differences) for f in findings)
    cells = [title, engine, str(len(findings)), *(f"{n:,}" for n in sums), str(differences)]
    return f"| {' | '.join(cells)} |"
