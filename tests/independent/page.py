"""What was found, as docs/conformance-independent.md."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .comparison import JUDGES, Finding
from .static_comparison import StaticFinding

HEAD = """# The compiler before a second opinion

Written by `make conformance` (`python -m tests.independent --write`). The judges of
[the conformance matrix](conformance-matrix.md) are given scales, zero points, codes, pads and fused bounds
by the compiled program. Here none of that is taken from the product: `tests/independent/` folds, fuses and
quantizes float networks by [the documentation's formulas](describe-your-npu.md#what-the-compiler-computes)
with code of its own, runs each whole network in the engine, every layer on the engine's own tensor before,
and compares scales, zero points, weight codes, bias codes and the outputs of all layers with what the
compiler and both backends make of the same float network. {differences}
"""


STATIC = """
## Before `quantize_static`

ONNX Runtime's own quantizer, QDQ format, on the same float models with the same ranges, after its own
optimizer folded batch norm and constants into weights:

| | networks | tensors | at a tie | weight scales | of a bias | codes | biases | in float32 | differences |
|---|---|---|---|---|---|---|---|---|---|
{rows}

Tensors: scale and zero point. At a tie: `quantize_static` divides by the scale before float32 rounds it, the
compiler after, so the zero point of a range that is symmetric about 0 may be 0 instead of -1. Of a bias:
weights are next to nothing beside it, and their scale is such that the bias fits; not compared, since it
fills 32 bits there and, as with TFLite's converter, 31 here. In float32: `quantize_static`
multiplies the two scales of a bias in float32, the compiler in float64, so such a code may be another
number; the compiler's must be the nearest to the real bias (where something was folded into it, in another
order of float32 operations: by one). A channel of zeros takes the scale 1 there, output scale / input scale
here. Average pools keep the input's scale there and are not compared, nor is what inherits it. Everything
else must be equal.
"""


def markdown(findings: Iterable[Finding | StaticFinding]) -> str:
    """The page."""
    findings = list(findings)
    total = sum(len(finding.differences) for finding in findings)
    words = "**Nothing differs.**" if not total else f"**{total} differences.**"
    lines = [HEAD.format(differences=words)]
    lines += ["| | engine | networks | layers | outputs | weight and bias codes | differences |"]
    lines += ["|---|---|---|---|---|---|---|"]
    engines = [finding for finding in findings if isinstance(finding, Finding)]
    for title, group in _groups(engines):
        for name in JUDGES:
            some = [finding for finding in group if finding.judge == name]
            if some:
                lines.append(_row([title, name], some, ("layers", "elements", "weights")))
    static = [finding for finding in findings if isinstance(finding, StaticFinding)]
    keys = ("tensors", "ties", "channels", "bias_bound", "codes", "biases", "off_biases")
    rows = [_row([title], group, keys) for title, group in _groups(static)]
    return "\n".join(lines) + "\n" + STATIC.format(rows="\n".join(rows))


def _groups(findings: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """All random networks together, each real one by itself."""
    yield "random networks", [f for f in findings if f.network.startswith("random ")]
    for name in dict.fromkeys(f.network for f in findings):
        if not name.startswith("random "):
            yield name, [f for f in findings if f.network == name]


def _row(titles: list[str], findings: Sequence[Finding | StaticFinding], keys: tuple[str, ...]) -> str:
    sums = (sum(getattr(f, key) for f in findings) for key in keys)
    differences = sum(len(f.differences) for f in findings)
    cells = [*titles, str(len(findings)), *(f"{n:,}" for n in sums), str(differences)]
    return f"| {' | '.join(cells)} |"
