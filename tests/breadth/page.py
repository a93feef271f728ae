"""`docs/breadth.md`, from what came of the networks."""

from collections import Counter
from collections.abc import Sequence

from .examine import PROFILE, Outcome

_INTRO = """# Breadth: networks that others wrote

Every class of Hugging Face `transformers`' mappings for image classification, semantic segmentation,
object detection, depth estimation, audio classification and text classification, built from a tiny
configuration; the families of `geffnet`; recurrent, 1-D and 3-D networks and unusual signatures of our
own. Each in a process of its own, called as its users call it (`qat(**batch)`, labels included where the
model computes its loss), on random data, on the NPU `{profile}`: captured, calibrated, compiled, trained
for a step.

*Differ* counts INT8 numbers, of every layer, in which `emulator` and `reference` are not equal.
*Evaluation* counts numbers of the model's outputs in which the NPU's evaluation is not, bit for bit, the
training forward. *Gradients* counts parameters that FP32 gives a gradient and the loop gives none, or not
a finite one. *Host* counts layers that the chip's host computes in float, since the NPU cannot (or, as
softmax and layer norm, because the profile says so): their bits are the runtime's, not the chip's.

`make breadth` writes this page and [`breadth.json`](../benchmarks/results/breadth.json){commits}.
"""


def markdown(outcomes: Sequence[Outcome], catalogued: int) -> str:
    """The page.

    Args:
        outcomes: in the catalogue's order.
        catalogued: networks in the catalogue, measured or not.
    """
    commits = sorted({outcome.commit for outcome in outcomes if outcome.commit})
    named = f"; this one is of commit {', '.join(f'`{c}`' for c in commits)}" if commits else ""
    intro = _INTRO.format(profile=PROFILE, commits=named)
    parts = [intro, *_summary(outcomes)]
    if len(outcomes) < catalogued:
        parts.append(
            f"Not measured yet: {catalogued - len(outcomes)} of the catalogue's {catalogued} networks."
        )
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        parts += ["", f"## {group.capitalize()}", "", *_networks([o for o in outcomes if o.group == group])]
    return "\n".join([*parts, *_refusals(outcomes), *_unbuilt(outcomes)]) + "\n"


def _summary(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "| group | networks | run, all as it should be | run, something differs | refused "
        "| exceptions that are not ours, crashes, out of time | cannot be built here |",
        "|---" * 7 + "|",
    ]
    groups = [*dict.fromkeys(outcome.group for outcome in outcomes), "**all**"]
    for group in groups:
        chosen = [outcome for outcome in outcomes if group in (outcome.group, "**all**")]
        count = Counter(_verdict(outcome) for outcome in chosen)
        built = len(chosen) - count["not built"]
        share = f"{count['good']} ({100 * count['good'] / built:.0f} %)" if built else "-"
        lines.append(
            f"| {group} | {built} | {share} | {count['wrong']} | {count['refused']} | {count['bad']} "
            f"| {count['not built']} |"
        )
    running = [outcome for outcome in outcomes if outcome.status == "runs"]
    layers, host = sum(o.layers for o in running), sum(o.host_layers for o in running)
    share = 100 * host / max(1, layers)
    wrong = sum(outcome.mismatches for outcome in running)
    unequal, outputs = (sum(getattr(o, n) for o in running) for n in ("unequal_outputs", "outputs"))
    lost, gradients = sum(len(o.bad_gradients) for o in running), sum(o.gradients for o in running)
    lines += [
        "",
        f"In all: {layers:,} layers of {len(running)} networks, {share:.0f} % of them on the host.",
        f"{sum(o.elements for o in running):,} INT8 numbers compared, {wrong} differ;",
        f"{outputs:,} outputs, {unequal} differ between training forward and evaluation;",
        f"{gradients:,} parameters with a gradient in FP32, {lost} without a finite one in the loop.",
    ]
    return lines


def _verdict(outcome: Outcome) -> str:
    if outcome.status == "runs":
        return "good" if outcome.good else "wrong"
    if outcome.status in ("needs a package", "not built"):
        return "not built"
    return "refused" if outcome.status == "refused" else "bad"


def _networks(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "| network | weights | layers | host | numbers compared | differ | evaluation | gradients |",
        "|---" * 8 + "|",
    ]
    for outcome in outcomes:
        if outcome.status == "runs":
            lines.append(
                f"| {outcome.name} | {outcome.parameters:,} | {outcome.layers} | {outcome.host_layers} "
                f"| {outcome.elements:,} | {outcome.mismatches} "
                f"| {outcome.unequal_outputs} of {outcome.outputs:,} "
                f"| {len(outcome.bad_gradients)} of {outcome.gradients} |"
            )
        else:
            name = f"| {outcome.name} | {outcome.parameters:,} "
            lines.append(f"{name}| {outcome.status} " + "| " * 5 + "|")
    return lines


def _refusals(outcomes: Sequence[Outcome]) -> list[str]:
    chosen = [outcome for outcome in outcomes if _verdict(outcome) in ("refused", "bad")]
    if not chosen:
        return []
    lines = [
        "",
        "## What does not run, and what it is told",
        "",
        "| network | when | told |",
        "|---|---|---|",
    ]
    for outcome in chosen:
        lines.append(f"| {outcome.name} | {outcome.stage} | {_sentence(outcome)} |")
    return lines


def _unbuilt(outcomes: Sequence[Outcome]) -> list[str]:
    chosen = [outcome for outcome in outcomes if _verdict(outcome) == "not built"]
    if not chosen:
        return []
    lines = ["", "## What cannot be built here", "", "| network | why |", "|---|---|"]
    for outcome in chosen:
        why = f"needs the package {outcome.reason}" if outcome.status == "needs a package" else outcome.reason
        lines.append(f"| {outcome.name} | {_escaped(why)} |")
    return lines


def _sentence(outcome: Outcome) -> str:
    told = outcome.reason if outcome.status == "refused" else f"{outcome.status}: {outcome.reason}"
    return _escaped(told)


def _escaped(text: str) -> str:
    """One cell of a table; long messages are cut."""
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= 400 else line[:400] + " ..."
