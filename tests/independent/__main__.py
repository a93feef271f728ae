"""`python -m tests.independent`: the compiler before a second opinion; printed, and written to docs."""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .comparison import JUDGES, Finding
from .jobs import judge_random, judge_random_statically, judge_real
from .page import markdown
from .real_networks import REAL
from .static_comparison import StaticFinding

_PAGE = Path(__file__).parents[2] / "docs" / "conformance-independent.md"


def main() -> int:
    """Judges everything; exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.independent", description=__doc__)
    parser.add_argument("--networks", type=int, default=80, help="random networks for each engine")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="networks at the same time")
    parser.add_argument("--write", action="store_true", help=f"write docs/{_PAGE.name}")
    given = parser.parse_args()
    started = time.monotonic()
    findings: list[Finding | StaticFinding] = []
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(judge_real, name) for name in REAL]
        for first in range(0, given.networks, 20):
            seeds = range(first, min(first + 20, given.networks))
            futures += [pool.submit(judge_random, name, seeds) for name in JUDGES]
            futures.append(pool.submit(judge_random_statically, seeds))
        for future in futures:
            for finding in future.result():
                findings.append(finding)
                print(finding, flush=True)
    text = markdown(findings)
    print(text, f"{time.monotonic() - started:.0f} s", sep="\n")
    if given.write:
        _PAGE.write_text(text, "utf-8")
    return int(any(finding.differences for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
