"""One run: warm-up, a quiet moment, attacks with a quiet moment after each, and the verdict."""

import multiprocessing
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from . import hostile
from .pulse import Pulse
from .server import LEASE_S, STALL_S, Sample, ServerUnderAttack
from .verdict import judge_process, judge_witness, slope_mib_per_min, typical
from .witness import Witness

_QUIET_SAMPLES = 5
_ROUND_S = 540.0


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        seconds: of the whole run, from the first attack to the last.
        seed: of every random stream.
        clients: hostile ones.
        pause_s: mean pause of each between attacks.
        deadline_s: the longest that a step of the well-behaved client may take.
        log: file for the server's standard error.
    """

    seconds: float
    seed: int
    clients: int
    pause_s: float
    deadline_s: float
    log: Path

    @property
    def attacks_s(self) -> tuple[float, ...]:
        """Attacks with a quiet moment after each; the first is the warm-up: caches and pools fill."""
        warm_up = min(600.0, self.seconds / 3)
        rounds = max(1, round((self.seconds - warm_up) / _ROUND_S))
        return (warm_up, *[(self.seconds - warm_up) / rounds] * rounds)

    @property
    def settle_s(self) -> float:
        """Longest wait for quiet: the last attack ends, then its leases and deadlines pass."""
        return 60.0 + LEASE_S + STALL_S

    @property
    def longest_s(self) -> float:
        """The longest that a hostile client holds still."""
        return min(20.0, max(1.5 * STALL_S, self.seconds / 10))

    @property
    def sample_s(self) -> float:
        """Time between samples."""
        return min(5.0, self.seconds / 30)


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the plan and returns its report; the run is good when its "violations" are empty."""
    spawn = multiprocessing.get_context("spawn")
    going, ending = spawn.Event(), spawn.Event()
    results, sender = spawn.Pipe(duplex=False)
    server = ServerUnderAttack(plan.log)
    army = hostile.Army(server.place, plan.seed, plan.clients, plan.pause_s, plan.longest_s)
    process = spawn.Process(target=hostile.run, args=(army, going, ending, sender), daemon=True)
    process.start()
    sender.close()
    witness = Witness(server.endpoint, plan.seed, plan.deadline_s)
    pulse = Pulse(server.place)
    samples: list[Sample] = []
    violations: list[str] = []
    told: dict[str, Any] = {"attacks": {}, "violations": []}
    quiet: list[Sample] = []
    try:
        for seconds in plan.attacks_s:
            going.set()
            _watch(server, samples, seconds, plan.sample_s)
            going.clear()
            quiet.append(_quiet(server, samples, plan))
            say(f"after {quiet[-1].at_s:.0f} s: {_brief(quiet[-1])}")
    except _ServerDiedError as death:
        violations.append(str(death))
    finally:
        ending.set()
        if results.poll(60.0):
            told = results.recv()
        else:
            violations.append("the hostile clients did not end")
        process.join(10.0)
        process.kill()
        tally = witness.stop()
        unanswered = pulse.stop()
        status, took_s = server.stop()
    violations += told["violations"] + judge_witness(tally, plan.deadline_s)
    violations += [f"not answered: {question}" for question in unanswered]
    violations += [f"server's log: {line}" for line in server.complaints()[:20]]
    if quiet:
        violations += judge_process(quiet)
    if status != 0:
        violations.append(f"the server ended with exit status {status} (None: it had to be killed)")
    return {
        "commit": _commit(),
        "seed": plan.seed,
        "minutes": round(plan.seconds / 60, 2),
        "clients": plan.clients,
        "violations": violations,
        "attacks": told["attacks"],
        "well_behaved": asdict(tally),
        "pulse": {"answers": dict(pulse.answers), "longest_s": round(pulse.longest_s, 2)},
        "server": {
            "stop_s": round(took_s, 2),
            "slope_mib_per_min": slope_mib_per_min(quiet) if quiet else None,
            "columns": [field.name for field in fields(Sample)],
            "quiet": [list(astuple(sample)) for sample in quiet],
            "samples": [list(astuple(sample)) for sample in samples],
        },
    }


class _ServerDiedError(Exception):
    """The process under attack is gone."""


def _watch(server: ServerUnderAttack, samples: list[Sample], seconds: float, period_s: float) -> list[Sample]:
    """Samples the server for some time; returns the new ones."""
    begin, first = time.monotonic(), len(samples)
    while time.monotonic() - begin < seconds:
        time.sleep(period_s)
        if not server.alive:
            raise _ServerDiedError("the server died under attack; its log says why")
        samples.append(server.sample())
    return samples[first:]


def _quiet(server: ServerUnderAttack, samples: list[Sample], plan: Plan) -> Sample:
    """Waits until only the well-behaved client's session is left and nothing sinks; then measures."""
    begin = time.monotonic()
    while time.monotonic() - begin < plan.settle_s:
        last = _watch(server, samples, _QUIET_SAMPLES * 1.0, 1.0)
        alone = all(sample.sessions == 1 for sample in last)
        sinking = last[-1].threads < last[0].threads or last[-1].descriptors < last[0].descriptors
        if alone and not sinking and time.monotonic() - begin > plan.longest_s:
            break
    return typical(last)


def _brief(sample: Sample) -> str:
    return f"{sample.rss_mib:.0f} MiB, {sample.threads} threads, {sample.descriptors} descriptors"


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"
