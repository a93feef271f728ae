"""What must hold after a run, and how the numbers of the server's process are judged."""

from collections.abc import Sequence
from statistics import median

from .server import Sample
from .witness import Tally

# Allocators, thread pools and interned metrics do not come back to the last byte or thread; a leak goes on.
RSS_TOLERANCE_MIB = 64.0
THREAD_TOLERANCE = 8
DESCRIPTOR_TOLERANCE = 4
# From one quiet moment to the next in the second half of a run, where there are at least three.
SLOPE_MIB_PER_MIN = 0.5


def typical(samples: Sequence[Sample]) -> Sample:
    """The median of each number."""
    return Sample(
        at_s=samples[-1].at_s,
        rss_mib=median(s.rss_mib for s in samples),
        threads=round(median(s.threads for s in samples)),
        descriptors=round(median(s.descriptors for s in samples)),
        sessions=round(median(s.sessions for s in samples)),
        queued=round(median(s.queued for s in samples)),
    )


def slope_mib_per_min(quiet: Sequence[Sample]) -> float | None:
    """Least-squares slope of the resident memory over the second half; None: too few quiet moments."""
    middle = (quiet[0].at_s + quiet[-1].at_s) / 2
    late = [sample for sample in quiet if sample.at_s >= middle]
    if len(late) < 3:
        return None
    mean_t = sum(s.at_s for s in late) / len(late)
    mean_m = sum(s.rss_mib for s in late) / len(late)
    spread = sum((s.at_s - mean_t) ** 2 for s in late)
    covariance = sum((s.at_s - mean_t) * (s.rss_mib - mean_m) for s in late)
    return 60.0 * covariance / spread


def judge_process(quiet: Sequence[Sample]) -> list[str]:
    """What is not flat, from before the attack (with warm caches) over its pauses to after it."""
    wrong = []
    baseline, final = quiet[0], quiet[-1]
    grown = (
        ("resident memory, MiB", baseline.rss_mib, final.rss_mib, RSS_TOLERANCE_MIB),
        ("threads", baseline.threads, final.threads, THREAD_TOLERANCE),
        ("descriptors", baseline.descriptors, final.descriptors, DESCRIPTOR_TOLERANCE),
    )
    for what, before, after, tolerance in grown:
        if after > before + tolerance:
            wrong.append(f"{what}: {before} before the attack, {after} after it (tolerance {tolerance})")
    if final.sessions != 1 or final.queued > 1:
        wrong.append(f"{final.sessions} sessions and {final.queued} jobs are left; 1 session is legal")
    slope = slope_mib_per_min(quiet)
    if slope is not None and slope > SLOPE_MIB_PER_MIN:
        wrong.append(f"resident memory grows {slope:.2f} MiB a minute (tolerance {SLOPE_MIB_PER_MIN})")
    return wrong


def judge_witness(tally: Tally, deadline_s: float) -> list[str]:
    """What went wrong for the well-behaved client."""
    wrong = list(tally.errors)
    if tally.mismatches:
        wrong.append(f"{tally.mismatches} of {tally.elements} elements were not reference's")
    if tally.longest_step_s > deadline_s:
        wrong.append(f"a step took {tally.longest_step_s:.1f} s (deadline {deadline_s:g} s)")
    if tally.batches == 0:
        wrong.append("the well-behaved client did not finish a single batch")
    return wrong
