"""Runs the soak; exit status 1 if something is wrong, lost or left behind."""

import argparse
import time

from tests.soak.campaign import soak


def main() -> int:
    """Prints what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--kill-every", type=int, default=500, help="batches between two kills, on average")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    begin = time.monotonic()
    outcome = soak(options.batches, options.kill_every, options.seed, print)
    print(f"{outcome} ({time.monotonic() - begin:.0f} s)")
    for fault in outcome.faults:
        print(f"FAULT: {fault}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
