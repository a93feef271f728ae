"""`python -m tests.breadth`: every network of the catalogue, examined; printed, and written to docs."""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the networks of the other tests are shared

from .children import outcomes
from .examine import Outcome
from .networks import Network, catalogue
from .page import markdown

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "breadth.md", ROOT / "benchmarks" / "results" / "breadth.json"


def main() -> int:
    """Examines; exit status 1 where a network runs wrongly, or ends in anything but a refusal."""
    parser = argparse.ArgumentParser(prog="python -m tests.breadth", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="with this in their name")
    parser.add_argument("--group", help="networks of this group")
    parser.add_argument("--jobs", type=int, default=1, help="networks at the same time")
    parser.add_argument("--json", type=Path, help="add what came of each to this file")
    parser.add_argument(
        "--again", action="store_true", help="leave out what the file says is as it should be"
    )
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name} and {RESULTS.name}")
    given = parser.parse_args()
    file = given.json or (RESULTS if given.again else None)
    known = _read(file) if file and file.exists() else {}
    chosen = [
        network
        for network in catalogue()
        if (not given.only or any(part.lower() in network.name.lower() for part in given.only))
        and given.group in (None, network.group)
        and not (given.again and network.name in known and _done(known[network.name]))
    ]
    commit = _commit()
    for outcome in outcomes(chosen, given.jobs):
        outcome.commit = commit
        outcome.reason = re.sub(r"[^\s'\"]*site-packages/", "", outcome.reason)  # no paths of this machine
        known[outcome.name] = outcome
        print(_line(outcome), flush=True)
        if given.json:
            _write(given.json, _in_order(known.values(), catalogue()))
    everything = _in_order(known.values(), catalogue())
    if given.write:
        _write(RESULTS, everything)
        PAGE.write_text(markdown(everything, len(catalogue())), "utf-8")
    return int(any(not _done(outcome) and outcome.status != "refused" for outcome in everything))


def _done(outcome: Outcome) -> bool:
    return outcome.good or outcome.status == "needs a package"


def _in_order(found: Iterable[Outcome], networks: Iterable[Network]) -> list[Outcome]:
    by_name = {outcome.name: outcome for outcome in found}
    return [by_name[network.name] for network in networks if network.name in by_name]


def _read(file: Path) -> dict[str, Outcome]:
    return {line["name"]: Outcome(**line) for line in json.loads(file.read_text("utf-8"))["networks"]}


def _write(file: Path, found: Iterable[Outcome]) -> None:
    content = {"networks": [asdict(outcome) for outcome in found]}
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _commit() -> str:
    """Of the code that is measured; empty where this is no checkout."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip()


def _line(outcome: Outcome) -> str:
    if outcome.status != "runs":
        when = f"({outcome.stage}, {outcome.seconds} s)"
        return f"{outcome.name}: {outcome.status} {when} {outcome.reason[:300]!r}"
    return (
        f"{outcome.name}: {outcome.layers} layers, {outcome.host_layers} on the host, "
        f"{outcome.elements} compared, {outcome.mismatches} differ; "
        f"{outcome.unequal_outputs} of {outcome.outputs} outputs differ in evaluation; "
        f"{len(outcome.bad_gradients)} of {outcome.gradients} gradients bad ({outcome.seconds} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
