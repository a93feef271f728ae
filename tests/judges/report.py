"""The matrix as lines on a terminal and as a page of the documentation."""

from npu_server.numerics.profile import list_profiles, load_profile

from .claims import Row


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
    elements, wrong = sum(c.elements for c in claimed), sum(c.mismatches for c in claimed)
    lines = [
        "# Conformance matrix",
        "",
        "Written by `make conformance`. Every number counts outputs of an engine that nobody here wrote,",
        "each compared with what `reference` and `emulator` compute from the same input and the same",
        "quantized weights: random shapes, strides, paddings, dilations, groups and scales (powers of two",
        "too: ties), extreme codes, biases that nearly fill the accumulator; and whole networks layer by",
        "layer, each layer on the engine's own tensor.",
        "",
        f"**{elements:,} elements compared, {wrong} mismatches.** Not claimed: the engine has no such",
        "integer operator, or a rule that the profile cannot express; the profile lists it as `unjudged`,",
        "and there our arithmetic is a specification of its own.",
        "",
    ]
    pairs = list(dict.fromkeys((row.profile, row.judge) for row in rows))
    heads = " | ".join(f"`{profile}`<br>{judge}" for profile, judge in pairs)
    lines += [f"| | {heads} |", "|---" * (len(pairs) + 1) + "|"]
    found = {(row.profile, row.judge, row.subject): row for row in rows}
    for subject in dict.fromkeys(row.subject for row in rows):
        cells = [_entry(found[*pair, subject]) for pair in pairs]
        lines.append(f"| {subject} | " + " | ".join(cells) + " |")
    lines += ["", "## Profiles without a judge", ""]
    lines += [
        "Specifications of our own, judged by hand-computed tables (`tests/unit/test_profile_by_hand.py`):",
        "",
    ]
    names = [name for name in list_profiles() if not load_profile(name).judged_by]
    lines += [f"- `{name}`: {load_profile(name).description}" for name in names]
    return "\n".join(lines) + "\n"


def _entry(row: Row) -> str:
    cell = row.cell
    if not row.claimed:
        return "not claimed"
    if not cell.elements:
        return f"**not judged** ({cell.unjudged})"
    layers = f" ({row.layers} layers)" if row.layers else ""
    wrong = f"**{cell.mismatches}**" if cell.mismatches else "0"
    return f"{wrong} of {cell.elements:,}{layers}"
