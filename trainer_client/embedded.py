"""The embedded server: a child process on a unix socket, started on demand and gone with its parent."""

import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

from npu_wire.channel import Endpoint
from npu_wire.errors import ServerUnavailable

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_LOG_TAIL_LINES = 12


class EmbeddedServer:
    """Starts `python -m npu_server serve` and keeps it alive.

    The child shuts down when its standard input closes, so it does not outlive this process, however it ends.

    Args:
        backend: name of the backend.
        profile: name or path of the numerics profile.
        device: where the backend computes.

    Raises:
        ServerUnavailable: it does not start; the message holds the end of its log.
    """

    def __init__(self, backend: str, profile: str, device: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="npu-"))
        self._log_path = self._folder / "server.log"
        self.endpoint = Endpoint(path=str(self._folder / "npu.sock"))
        self._command = [
            *(sys.executable, "-m", "npu_server", "serve", "--listen", self.endpoint.target, "--http", "off"),
            *("--backend", backend, "--profile", profile, "--device", device, "--exit-with-stdin"),
        ]
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.ensure_running()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    def ensure_running(self) -> None:
        """Starts the server if it does not run.

        Raises:
            ServerUnavailable: it does not start.
        """
        with self._lock:
            if self._closed or (self._process is not None and self._process.poll() is None):
                return
            self._reap()
            with self._log_path.open("ab") as log_file:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    env=_environment(),
                    # Ctrl-C at the terminal is the parent's to handle.
                    start_new_session=True,
                )
            self._wait_until_listening(self._process)

    def close(self) -> None:
        """Stops the server; idempotent."""
        with self._lock:
            self._closed = True
            self._reap()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _reap(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _wait_until_listening(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        said = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"listening on" not in said:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                piece = os.read(process.stdout.fileno(), 4096) if ready else b""
                if not piece:
                    state = process.poll() if not ready else process.wait()
                    why = (
                        f"stopped with exit status {state}"
                        if ready
                        else f"is silent for {_START_TIMEOUT_S:g} s"
                    )
                    raise ServerUnavailable(
                        f"the embedded server {why}; the end of its log:\n{self._log_tail()}"
                    )
                said += piece

    def _log_tail(self) -> str:
        with self._log_path.open(errors="replace") as log_file:
            return "".join(deque(log_file, _LOG_TAIL_LINES)).rstrip()


def _environment() -> dict[str, str]:
    """The child's environment: half of the cores, and an allocator that keeps big buffers mapped."""
    cores = len(os.sched_getaffinity(0))
    # NPU_* speaks to servers and clients that the user starts; this one is told everything by flags.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NPU_")}
    return inherited | {
        "OMP_NUM_THREADS": str(max(1, cores // 2)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    }
