"""`python -m tests.mutations`: every mutant against every killer, written to docs/mutations.md."""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .mutants import ROOT, load
from .report import complaint, markdown
from .run import copy_tree, examine

_PAGE = ROOT / "docs" / "mutations.md"


def main() -> int:
    """Exit status 1 where a mutant that must be caught is not, or a survivor has no reason."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument(
        "--only", nargs="*", default=[], help="mutants whose id contains one of these; no page"
    )
    parser.add_argument("--named", action="store_true", help="only those that went unnoticed once; no page")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="mutants at the same time")
    given = parser.parse_args()
    started = time.monotonic()
    mutants = [
        mutant
        for mutant in load()
        if (mutant.named or not given.named)
        and (not given.only or any(part in mutant.id for part in given.only))
    ]
    verdicts = {}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        pristine = Path(folder, "pristine")
        pristine.mkdir()
        copy_tree(pristine)
        sound = examine(None, pristine)
        if sound.outcome != "survived":
            print(f"the tree itself does not pass: {sound}")
            return 1
        print(f"the tree itself passes all killers ({sound.seconds:.0f} s)", flush=True)
        with ThreadPoolExecutor(given.processes) as pool:
            futures = [pool.submit(examine, mutant, pristine) for mutant in mutants]
            for mutant, future in zip(mutants, futures, strict=True):
                verdict = verdicts[mutant.id] = future.result()
                fault = complaint(mutant, verdict)
                print(
                    f"{verdict.outcome:9} {mutant.id:44} {verdict.seconds:4.0f} s  {verdict.test}", flush=True
                )
                if fault:
                    print(f"    {fault}", flush=True)
    faults = [mutant.id for mutant in mutants if complaint(mutant, verdicts[mutant.id])]
    killed = sum(verdict.outcome == "killed" for verdict in verdicts.values())
    print(
        f"{len(mutants)} mutants, {killed} caught, {len(faults)} faults; {time.monotonic() - started:.0f} s"
    )
    if not (given.only or given.named or faults):
        _PAGE.write_text(markdown(mutants, verdicts), "utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
