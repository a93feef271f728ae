"""The server under attack: a child process, seen from outside through /proc, its HTTP side and its log."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .foe import Place
from .recordings import PROFILE

MAX_SESSIONS = 8
LEASE_S = 4.0
STALL_S = 5.0
_FLAGS = {
    "--backend": "emulator",
    "--profile": PROFILE,
    "--threads": "1",
    "--listen": "127.0.0.1:0",
    "--http": "127.0.0.1:0",
    "--max-sessions": str(MAX_SESSIONS),
    "--max-model-bytes": str(16 * 2**20),
    "--max-session-bytes": str(24 * 2**20),
    "--max-server-bytes": str(256 * 2**20),
    "--lease-s": str(LEASE_S),
    "--stall-s": str(STALL_S),
    "--log-level": "WARNING",
}
_STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Sample:
    """The server process at one moment.

    Attributes:
        at_s: seconds since it listened.
        rss_mib: resident memory.
        threads: of the process.
        descriptors: open files and sockets.
        sessions: open, as it says itself; -1: no answer.
        queued: jobs that wait for the device; -1: no answer.
    """

    at_s: float
    rss_mib: float
    threads: int
    descriptors: int
    sessions: int
    queued: int


class ServerUnderAttack:
    """`npu-server serve` in a process of its own.

    Args:
        log: file for its standard error.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        flags = [part for flag in _FLAGS.items() for part in flag]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NPU_")}
        with log.open("wb") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "npu_server", "serve", *flags, "--exit-with-stdin"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env=environment | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            )
        assert self._process.stdout is not None
        lines = [self._process.stdout.readline() for _ in range(2)]
        found = [re.search(r"on ([\d.]+):(\d+)$", line.strip()) for line in lines]
        if not all(found):
            raise RuntimeError(f"the server did not start: {lines}\n{log.read_text()}")
        addresses = [(match[1], int(match[2])) for match in found if match]
        self.place = Place(*addresses)
        self._started = time.monotonic()

    @property
    def endpoint(self) -> str:
        """Its gRPC address."""
        return f"{self.place.grpc[0]}:{self.place.grpc[1]}"

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def sample(self) -> Sample:
        """Looks at the process from outside."""
        proc = Path(f"/proc/{self._process.pid}")
        status = dict(
            line.split(":\t") for line in (proc / "status").read_text().splitlines() if ":\t" in line
        )
        sessions = queued = -1
        with contextlib.suppress(OSError, ValueError):
            url = f"http://127.0.0.1:{self.place.http[1]}/api/v1/status"
            with urllib.request.urlopen(url, timeout=10.0) as answer:
                told = json.load(answer)
            sessions, queued = len(told["sessions"]), told["queue_depth"]
        return Sample(
            at_s=round(time.monotonic() - self._started, 1),
            rss_mib=round(int(status["VmRSS"].split()[0]) / 1024, 1),
            threads=int(status["Threads"]),
            descriptors=len(os.listdir(proc / "fd")),
            sessions=sessions,
            queued=queued,
        )

    def stop(self) -> tuple[int | None, float]:
        """Asks it to end; exit status (None: it had to be killed) and the seconds that it took."""
        begin = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        status: int | None
        try:
            status = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
            self._process.send_signal(signal.SIGABRT)  # its log then says where every thread was
            self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        return status, time.monotonic() - begin

    def complaints(self) -> list[str]:
        """Lines of its log that speak of errors which it did not expect."""
        lines = self._log.read_text(errors="replace").splitlines()
        return [line for line in lines if " ERROR " in line or line.startswith(("Traceback", "Fatal"))]
