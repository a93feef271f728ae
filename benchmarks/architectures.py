"""The table of architectures: what compiles, what is equal, what an engine says, how much noise there is.

    python benchmarks/architectures.py [--only NAME ...] [--profile tflm ...] [--write]

Prints the tables of docs/architectures.md; with --write puts them there, and the noise of every single layer
into docs/architectures_layers.csv. Needs the dev extra and the packages that the catalogue names.
"""

import argparse
import csv
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the catalogue is shared with the tests

from architectures.catalogue import CATALOGUE, Architecture  # noqa: E402
from architectures.examine import Examination, Prepared  # noqa: E402
from architectures.judging import Verdict, judge_network  # noqa: E402
from architectures.learning import learn  # noqa: E402
from judges import engines  # noqa: E402

from npu_wire.errors import UnsupportedModel  # noqa: E402

JUDGED_BY = {"tflm": "TFLM", "onnxruntime": "ONNX Runtime"}
PAGE, CSV = ROOT / "docs" / "architectures.md", ROOT / "docs" / "architectures_layers.csv"


@dataclass(frozen=True)
class Row:
    """One network under one profile; `refusal` where it does not compile."""

    architecture: Architecture
    profile: str
    examination: Examination | None = None
    verdict: Verdict | None = None
    refusal: str = ""


def measure(architecture: Architecture, profiles: list[str]) -> list[Row]:
    """Examines a network under some profiles."""
    prepared = Prepared(architecture)
    rows = []
    for profile in profiles:
        try:
            result = prepared.examine(profile)
        except UnsupportedModel as error:
            rows.append(Row(architecture, profile, refusal=str(error)))
            continue
        verdict = None
        if profile in JUDGED_BY:
            judge = engines.find(JUDGED_BY[profile])
            verdict = judge_network(judge, result.model, result.ranges, profile, result.input_codes)
        rows.append(Row(architecture, profile, result, verdict))
    return rows


def equality_table(rows: list[Row]) -> list[str]:
    """Layers, elements, mismatches, judged layers, gradients of the profile that a judge stands for."""
    lines = [
        "| network | code | weights | INT8 layers | numbers computed twice | differ | judged by TFLM: "
        "layers, numbers | differ | not injected | parameters with a finite / a nonzero gradient |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        result, verdict, name = row.examination, row.verdict, row.architecture.name
        if result is None:
            lines.append(f"| {name} | {row.architecture.source} | refused: {row.refusal} " + "| " * 7 + "|")
            continue
        judged = "- | -"
        if verdict is not None:
            share = f"{verdict.layers} of {len(result.layers)}, {verdict.elements:,}"
            judged = f"{share} | {verdict.mismatches}"
        got = result.gradients
        finite = got.parameters - len(got.without) - len(got.not_finite)
        gradients = f"{finite} / {finite - len(got.zero)} of {got.parameters}"
        lines.append(
            f"| {name} | {row.architecture.source} | {result.weights:,} | {len(result.layers)} "
            f"| {result.elements:,} | {result.mismatches} | {judged} | {len(result.missing)} | {gradients} |"
        )
    return lines


def totals_table(rows: list[Row], profiles: list[str]) -> list[str]:
    """All networks together, profile by profile."""
    lines = [
        "| profile | networks | layers | numbers computed twice | differ "
        "| judge | layers | numbers | differ |",
        "|---" * 9 + "|",
    ]
    for profile in profiles:
        results = [row.examination for row in rows if row.profile == profile and row.examination]
        verdicts = [row.verdict for row in rows if row.profile == profile and row.verdict]
        judged = "none | - | - | -"
        if verdicts:
            judged = (
                f"{verdicts[0].judge} | {sum(v.layers for v in verdicts):,} "
                f"| {sum(v.elements for v in verdicts):,} | {sum(v.mismatches for v in verdicts)}"
            )
        lines.append(
            f"| `{profile}` | {len(results)} | {sum(len(r.layers) for r in results):,} "
            f"| {sum(r.elements for r in results):,} | {sum(r.mismatches for r in results)} | {judged} |"
        )
    return lines


def noise_table(rows: list[Row], profiles: list[str]) -> list[str]:
    """SQNR of the layers: median, and the worst layer by name; SQNR of the whole network's output."""
    head = " | ".join(f"{p}: median, worst layer, output" for p in profiles)
    lines = [f"| network | {head} |", "|---" * (len(profiles) + 1) + "|"]
    for name in dict.fromkeys(row.architecture.name for row in rows):
        cells = [_noise_cell(row) for row in rows if row.architecture.name == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _noise_cell(row: Row) -> str:
    if row.examination is None:
        return f"refused: {row.refusal}"
    ratios = {name: noise.sqnr_db for name, noise in row.examination.noisy}
    worst = min(ratios, key=ratios.__getitem__)
    op = next(layer.spec.op for layer in row.examination.layers if layer.spec.name == worst)
    median, output = statistics.median(ratios.values()), row.examination.output_sqnr_db
    return f"{median:.1f}, {ratios[worst]:.1f} (`{worst}`, {op}), {output:.1f}"


def unjudged_list(rows: list[Row]) -> list[str]:
    """Operators that the judge has nothing to say about, with its reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for operator, reason in (row.verdict.unjudged if row.verdict else {}).items():
            reasons.setdefault((operator, reason), []).append(row.architecture.name)
    return [f"- {op}: {reason} ({', '.join(names)})" for (op, reason), names in sorted(reasons.items())]


def learning_table(profiles: list[str]) -> list[str]:
    """Accuracy of a small transformer before and after training in the loop."""
    lines = [
        "| NPU | FP32 | its weights on the NPU | after training in the loop | layers injected |",
        "|---" * 5 + "|",
    ]
    for profile in profiles:
        o = learn(profile)
        lines.append(f"| `{profile}` | {o.fp32:.2f} | {o.before:.2f} | {o.after:.2f} | {o.injected} |")
    return lines


def write_layers(rows: list[Row], path: Path) -> None:
    """One line a layer."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(
            ["network", "profile", "layer", "op", "shape", "sqnr_db", "mean_noise_lsb", "max_noise_lsb"]
        )
        for row in rows:
            for layer in row.examination.layers if row.examination else ():
                shape = "x".join(map(str, layer.spec.output.shape))
                numbers = ["", "", ""]
                if layer.noise is not None:
                    noise = layer.noise
                    numbers = [
                        f"{noise.sqnr_db:.1f}",
                        f"{noise.mean_noise_lsb:.3f}",
                        f"{noise.max_noise_lsb:.2f}",
                    ]
                out.writerow(
                    [row.architecture.name, row.profile, layer.spec.name, layer.spec.op, shape, *numbers]
                )


def replace_between(text: str, mark: str, lines: list[str]) -> str:
    """Puts lines between `<!-- MARK -->` and `<!-- end MARK -->`."""
    before, _, rest = text.partition(f"<!-- {mark} -->\n")
    _, _, after = rest.partition(f"<!-- end {mark} -->")
    return before + "\n".join([f"<!-- {mark} -->", *lines, f"<!-- end {mark} -->"]) + after


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of networks")
    parser.add_argument("--profile", nargs="*", default=["tflm", "onnxruntime", "pow2-trunc"])
    parser.add_argument(
        "--learn", nargs="*", default=["tflm", "pow2-trunc", "acc16"], help="NPUs to learn on"
    )
    parser.add_argument("--write", action="store_true", help="write docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for architecture in CATALOGUE:
        if options.only and not any(part in architecture.name for part in options.only):
            continue
        start = time.monotonic()
        rows += measure(architecture, options.profile)
        print(f"{architecture.name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    judged = [row for row in rows if row.profile == options.profile[0]]
    tables = {
        "equality": equality_table(judged),
        "totals": totals_table(rows, options.profile),
        "unjudged": unjudged_list(judged),
        "noise": noise_table(rows, options.profile),
        "learning": learning_table(options.learn),
    }
    for lines in tables.values():
        print("\n".join(lines), end="\n\n")
    if options.write:
        text = PAGE.read_text()
        for mark, lines in tables.items():
            text = replace_between(text, mark, lines)
        PAGE.write_text(text)
        write_layers(rows, CSV)


if __name__ == "__main__":
    main()
