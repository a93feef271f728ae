"""The matrix as lines on a terminal and as a page of the documentation."""

from collections import Counter

from npu_server.numerics.profile import list_profiles, load_profile

from . import provenance
from .cell import Cell
from .claims import Row

COMPOSED_IN_TOSA = {
    "convolution": ("CONV2D", "RESCALE"),
    "pointwise convolution": ("CONV2D", "RESCALE"),
    "dilated convolution": ("CONV2D", "RESCALE"),
    "depthwise convolution": ("DEPTHWISE_CONV2D", "RESCALE"),
    "fully connected": ("RESHAPE", "CONV2D", "RESCALE"),
    "add": ("RESCALE", "ADD", "RESCALE"),
    "sub": ("RESCALE", "SUB", "RESCALE"),
    "mul": ("RESCALE", "MUL", "RESCALE"),
    "concat": ("RESCALE", "CONCAT"),
    "mean": ("RESCALE", "REDUCE_SUM", "RESCALE"),
    "relu": ("RESCALE", "CLAMP"),
}
"""Row -> the operators that this harness puts in its place, because TOSA has none with scales of its own;
several of a kind in a row (one for each operand, for each axis) are named once."""

_INTRODUCTION = """\
# Conformance matrix

Written by `make conformance`. Every number counts outputs of an engine that nobody here wrote, each
compared with what `reference` and `emulator` compute from the same input.

**{elements:,} outputs compared in {configurations:,} configurations, {wrong} mismatches.**
{exhausted:,} of the configurations were compared on every input that exists: all 256 codes of an
operator of one operand, all 65,536 pairs of one of two. The others are samples: random shapes,
windows, paddings, groups and scales (powers of two too: ties), extreme codes, biases that nearly
fill the accumulator; and whole networks layer by layer, each layer on the engine's own tensor.

A cell says how many outputs differ, of how many, whether all inputs were tried (*exhaustive*) or
not (*sampled*), in how many configurations (a model: shapes, scales, zero points, weights), and how
many more configurations were drawn but *refused*: the engine or this harness has no such operator,
or the profile lists the condition as `unjudged`. *Not claimed*: the profile lists the whole
operator as `unjudged`; there our arithmetic is a specification of its own.
"""

_TAKEN = """\
## What the judges take from the product, and what they compute

Taken from the compiled program: scales and zero points of all tensors, codes and scales of weights,
codes of biases, what is folded and fused, pads, the bounds of activations, the mirrored kernel of a
transposed convolution, the axes. Whether these are right is judged elsewhere, from the
documentation alone: `docs/conformance-independent.md`.

Computed by the engine alone: multipliers, mantissas and shifts, every sum, every rounding,
saturation, tables of functions, what padding does to averages. TOSA's RESCALE takes its multiplier
and shift as operands; this harness computes them from the scales by a formula of its own
(`tests/judges/tosa.py`).

Composed in TOSA, which has no operator with scales of its own in their place (so the rule that is
judged there is the composition's, each of its operators computed by the reference model):
"""


def summary(rows: list[Row], seconds: float) -> str:
    """The last line of a run."""
    claimed = [row.cell for row in rows if row.claimed]
    elements, wrong = sum(c.elements for c in claimed), sum(c.mismatches for c in claimed)
    broken = sum(row.broken for row in rows)
    verdict = f"{broken} CLAIMS DO NOT HOLD" if broken else "every claim holds"
    return f"{elements:,} elements compared, {wrong} mismatches, {verdict}; {seconds:.0f} s"


def markdown(rows: list[Row]) -> str:
    """The page `docs/conformance-matrix.md`."""
    claimed = [row.cell for row in rows if row.claimed]
    lines = [
        _INTRODUCTION.format(
            elements=sum(cell.elements for cell in claimed),
            wrong=sum(cell.mismatches for cell in claimed),
            configurations=sum(cell.configurations for cell in claimed),
            exhausted=sum(cell.exhausted for cell in claimed),
        )
    ]
    pairs = list(dict.fromkeys((row.profile, row.judge) for row in rows))
    heads = " | ".join(f"`{profile}`<br>{judge}" for profile, judge in pairs)
    lines += [f"| | {heads} |", "|---" * (len(pairs) + 1) + "|"]
    found = {(row.profile, row.judge, row.subject): row for row in rows}
    for subject in dict.fromkeys(row.subject for row in rows):
        cells = [_entry(found[*pair, subject]) for pair in pairs]
        lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    lines += ["", _TAKEN]
    lines += [f"- {subject}: {', '.join(ops)}" for subject, ops in COMPOSED_IN_TOSA.items()]
    lines += ["", "## What profiles do not claim", ""]
    lines += [f"- `{name}`: {'; '.join(load_profile(name).unjudged) or 'nothing'}" for name, _ in pairs]
    lines += ["", "## Why configurations were refused", ""]
    lines += [f"- {judge}: {reason} ({count:,})" for (judge, reason), count in _refusals(rows)]
    lines += ["", "## Where it ran", ""]
    lines += [f"- CPU: {provenance.processor()}", f"- Engines: {provenance.versions()}"]
    lines += [f"- Kernels of the emulator, each judged: {provenance.kernels()}"]
    lines += [f"- {DIGEST}{provenance.digest()}", "", "## Profiles without a judge", ""]
    lines += ["Specifications of our own, calculated by hand (`tests/unit/test_profile_by_hand.py`):", ""]
    names = [name for name in list_profiles() if not load_profile(name).judged_by]
    lines += [f"- `{name}`: {load_profile(name).description}" for name in names]
    return "\n".join(lines) + "\n"


DIGEST = "Digest of the rules, backends and judges that it is about: "
"""What stands on the page before `provenance.digest()`."""


def _refusals(rows: list[Row]) -> list[tuple[tuple[str, str], int]]:
    """(engine, reason) and how often, of what is claimed."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row.claimed:
            for reason, count in row.cell.refusals.items():
                counts[row.judge, reason] += count
    return sorted(counts.items())


def _entry(row: Row) -> str:
    cell = row.cell
    if not row.claimed:
        return "not claimed"
    if not cell.elements:
        return f"**not judged** ({cell.unjudged})"
    wrong = f"**{cell.mismatches}**" if cell.mismatches else "0"
    composed = ", composed" if row.judge.startswith("TOSA") and row.subject in COMPOSED_IN_TOSA else ""
    return f"{wrong} of {cell.elements:,} {_how(cell)}{composed}<br>{_where(row)}"


def _how(cell: Cell) -> str:
    if not cell.exhausted:
        return "sampled"
    return "exhaustive" if cell.exhausted == cell.configurations else "exhaustive and sampled"


def _where(row: Row) -> str:
    cell, refused = row.cell, sum(row.cell.refusals.values())
    unit = "layer" if row.layers else "configuration"
    unit += "" if cell.configurations == 1 else "s"
    some = f", {cell.exhausted:,} exhausted" if 0 < cell.exhausted < cell.configurations else ""
    return f"{cell.configurations:,} {unit}{some}" + (f", {refused:,} refused" if refused else "")
