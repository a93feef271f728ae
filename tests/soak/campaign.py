"""Kills trainers and servers in turn, at random times, and looks at what is left of them."""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_SETTLE_S = 60.0
# Of a process that has done ten times the work; allocators and caches may breathe.
_GROWTH_BYTES = 48 * 2**20
_MOST_FILES, _MOST_THREADS = 60, 120


@dataclass
class Outcome:
    """What has happened.

    Attributes:
        batches: computed and checked.
        shared: of the looks at a trainer, how many saw it read shared memory.
        looks: how many there were.
        killed_trainers, killed_servers: how many.
        faults: what was wrong.
    """

    batches: int = 0
    shared: int = 0
    looks: int = 0
    killed_trainers: int = 0
    killed_servers: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.batches} batches, in shared memory at {self.shared} of {self.looks} looks, "
            f"{self.killed_trainers} trainers and {self.killed_servers} servers killed, "
            f"{len(self.faults)} faults"
        )


class _Process:
    """One of the two sides."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def line(self) -> str:
        """The next that it says; empty when it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self) -> list[int]:
        """What a server holds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return [int(word) for word in self.line().split()]

    def kill(self) -> None:
        """-9."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def soak(batches: int, kill_every: int, seed: int, say: Callable[[str], object]) -> Outcome:
    """Runs so many batches."""
    chance, outcome = random.Random(seed), Outcome()
    with tempfile.TemporaryDirectory(prefix="npu-soak-") as folder:
        address = f"unix:{folder}/npu.sock"
        server, trainer = _server(address), _trainer(address, seed)
        try:
            first: dict[str, int] = {}
            until_kill = chance.randint(1, 2 * kill_every)
            while outcome.batches < batches and not outcome.faults:
                line = trainer.line()
                if not line or line == "wrong bits":
                    outcome.faults.append(line or "the trainer ended by itself")
                    break
                outcome.batches += 1
                until_kill -= 1
                if " " in line:
                    _look_at_trainer(line, first, outcome)
                if until_kill > 0:
                    continue
                until_kill = chance.randint(1, 2 * kill_every)
                if outcome.killed_servers < outcome.killed_trainers:
                    server.kill()
                    server = _server(address)
                    outcome.killed_servers += 1
                    first.pop("server", None)
                else:
                    trainer.kill()
                    outcome.killed_trainers += 1
                    _look_at_server(server, first, outcome)
                    first.pop("trainer", None)
                    trainer = _trainer(address, seed + outcome.killed_trainers)
                say(str(outcome))
            trainer.kill()
            _look_at_server(server, first, outcome)
        finally:
            trainer.kill()
            server.kill()
    return outcome


def _server(address: str) -> _Process:
    Path(address.removeprefix("unix:")).unlink(missing_ok=True)
    process = _Process("tests.soak.device", address)
    assert process.line() == "serving"
    return process


def _trainer(address: str, seed: int) -> _Process:
    return _Process("tests.soak.trainer", address, str(seed))


def _look_at_trainer(line: str, first: dict[str, int], outcome: Outcome) -> None:
    number, threads, files, memory, shared, is_shared = line.split()
    outcome.looks += 1
    outcome.shared += is_shared == "True"
    if int(threads) > _MOST_THREADS or int(files) > _MOST_FILES:
        outcome.faults.append(f"the trainer has {threads} threads and {files} descriptors")
    if int(number) >= 100:  # warm by then
        begin = first.setdefault("trainer", int(memory))
        if int(memory) > begin + _GROWTH_BYTES:
            outcome.faults.append(f"the trainer has grown from {begin} to {memory} bytes")
    # What it holds may lie in the memory of a few servers that are gone.
    if int(shared) > 16 * 2**22:
        outcome.faults.append(f"the trainer maps {shared} bytes of servers")


def _look_at_server(server: _Process, first: dict[str, int], outcome: Outcome) -> None:
    """Without a trainer nothing may be left, once leases are over."""
    end = time.monotonic() + _SETTLE_S
    while True:
        sessions, committed, held, maps, threads, files, memory = server.ask()
        if not (sessions or committed or held or maps):
            break
        if time.monotonic() > end:
            outcome.faults.append(
                f"the server keeps {sessions} sessions, {held} bytes, {committed} of shared memory, "
                f"{maps} mappings"
            )
            return
        time.sleep(0.1)
    begin = first.setdefault("server", memory)
    if memory > begin + _GROWTH_BYTES:
        outcome.faults.append(f"the server has grown from {begin} to {memory} bytes")
    if threads > _MOST_THREADS or files > _MOST_FILES:
        outcome.faults.append(f"the server has {threads} threads and {files} descriptors")
