"""`python -m tests.judges`: the matrix profile x operator x judge, printed and written to docs."""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from npu_server.numerics.profile import list_profiles, load_profile

from .cases import DRAWS
from .claims import Extent, Row, judge_claim
from .networks import NETWORKS
from .report import markdown, summary

_PAGE = Path(__file__).parents[2] / "docs" / "conformance-matrix.md"


def main() -> int:
    """Judges everything; exit status 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.judges", description=__doc__)
    parser.add_argument("--elements", type=int, default=300_000, help="outputs of random layers in each cell")
    parser.add_argument("--scales", type=int, default=6_000, help="scales at which every code is compared")
    parser.add_argument("--triples", type=int, default=500, help="scales at which every pair is compared")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cells at the same time")
    parser.add_argument("--profile", help="only this profile")
    parser.add_argument("--write", action="store_true", help="write docs/conformance-matrix.md")
    given = parser.parse_args()
    started = time.monotonic()
    pairs = [
        (name, judge)
        for name in list_profiles()
        for judge in load_profile(name).judged_by
        if given.profile in (None, name)
    ]
    subjects = [*NETWORKS, *DRAWS]
    extent = Extent(given.elements, given.scales, given.triples)
    jobs = list(itertools.product(pairs, subjects))
    rows: list[Row] = []
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(judge_claim, *pair, subject, extent) for pair, subject in jobs]
        for future in futures:
            rows.append(future.result())
            print(rows[-1], flush=True)
    print(summary(rows, time.monotonic() - started))
    if given.write:
        _PAGE.write_text(markdown(rows), "utf-8")
    return int(any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
