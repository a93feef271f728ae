"""The parts of the run that go to processes of their own."""

from .comparison import JUDGES, Finding, judge
from .random_networks import draw
from .real_networks import REAL
from .static_comparison import StaticFinding, judge_static


def judge_random(name: str, seeds: range) -> list[Finding]:
    """Random networks before an engine, every fourth with one weight scale a tensor."""
    by = JUDGES[name]
    return [judge(draw(seed, by.for_tflite), by, per_channel=seed % 4 != 3) for seed in seeds]


def judge_random_statically(seeds: range) -> list[StaticFinding]:
    """Random networks before `quantize_static`, every fourth with one weight scale a tensor."""
    return [judge_static(draw(seed), per_channel=seed % 4 != 3) for seed in seeds]


def judge_real(name: str) -> list[Finding | StaticFinding]:
    """A real network before every engine, and before `quantize_static`."""
    subject = REAL[name]()
    return [*(judge(subject, by) for by in JUDGES.values()), judge_static(subject)]
