"""The command `python -m tests.fuzz_wire`."""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import __doc__ as _ABOUT
from .campaign import Plan, run


def main() -> int:
    """Runs one campaign; exit status 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_wire", description=_ABOUT)
    parser.add_argument("--minutes", type=float, default=1.0, help="of attack, warm-up included")
    parser.add_argument("--seed", type=int, help="of every random stream; none: a new one, which is printed")
    parser.add_argument("--clients", type=int, default=4, help="hostile ones")
    parser.add_argument("--pause-s", type=float, default=0.3, help="mean pause of each between attacks")
    parser.add_argument(
        "--deadline-s", type=float, default=90.0, help="longest step of the well-behaved client"
    )
    parser.add_argument("--json", type=Path, help="write the report to this file")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="npu-fuzz-") as folder:
        log = given.json.with_suffix(".log") if given.json else Path(folder) / "server.log"
        plan = Plan(60 * given.minutes, seed, given.clients, given.pause_s, given.deadline_s, log)
        report = run(plan, lambda text: print(text, flush=True))
    if given.json:
        given.json.write_text(_as_json(report))
    _print(report, Console(width=140))
    return 1 if report["violations"] else 0


def _as_json(report: Mapping[str, Any]) -> str:
    """JSON with a line for each row of numbers."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\[[\s\d.,-]+\]", lambda row: " ".join(row[0].split()), text) + "\n"


def _print(report: Mapping[str, Any], console: Console) -> None:
    table = Table(title=f"attacks, seed {report['seed']}, {report['minutes']} minutes")
    for column in ("attack", "count", "outcomes"):
        table.add_column(column, justify="right" if column == "count" else "left")
    for name, outcomes in report["attacks"].items():
        listed = ", ".join(f"{outcome} ({count})" for outcome, count in list(outcomes.items())[:8])
        table.add_row(name, str(sum(outcomes.values())), listed)
    console.print(table)
    well, server = report["well_behaved"], report["server"]
    console.print(
        f"well-behaved client: {well['steps']} steps, {well['sessions']} sessions, {well['batches']} batches "
        f"and {well['elements']:,} elements compared, {well['mismatches']} mismatches, "
        f"{well['refusals']} refusals, longest step {well['longest_step_s']:.1f} s"
    )
    console.print(f"always answered: {report['pulse']['answers']}, longest {report['pulse']['longest_s']} s")
    console.print(f"server in quiet moments, {', '.join(server['columns'])}:")
    for moment in server["quiet"]:
        console.print(f"  {moment}")
    slope = server["slope_mib_per_min"]
    console.print(f"resident memory: {slope} MiB a minute; ended in {server['stop_s']} s")
    for violation in report["violations"]:
        console.print(f"VIOLATION: {violation}", markup=False, style="red", soft_wrap=True)
    if report["violations"]:
        flags = " ".join(f"--{name} {report[name]}" for name in ("seed", "minutes", "clients"))
        console.print(f"again: python -m tests.fuzz_wire {flags}")


if __name__ == "__main__":
    sys.exit(main())
