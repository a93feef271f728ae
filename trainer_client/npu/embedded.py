"""The embedded server: a child process on a unix socket, started on demand and gone with its parent."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO

from npu_wire.channel import MAX_SOCKET_PATH_BYTES, Endpoint
from npu_wire.errors import InvalidInput, MissingPackage, ServerUnavailable

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 30.0
_LOG_TAIL_LINES = 12
_LOG_TAIL_BYTES = 16_384
_SOCKET = "npu.sock"
_CALLED_WRONGLY = 2  # exit status


class EmbeddedServer:
    """Starts `python -m npu_server serve` and keeps it alive.

    The child shuts down and removes its socket when this process is gone, however it ends. A process that is
    forked from this one has no part in the server. What the child prints goes to this module's logger, at
    level DEBUG.

    Args:
        backend: name of the backend; None, here and below: the server's default.
        profile: name or path of the numerics profile.
        device: where the backend computes.

    Raises:
        InvalidInput: no folder for temporary files can hold a socket.
        MissingPackage: this environment has no server; the message holds the install line.
        ServerUnavailable: it does not start; the message holds the end of its log.
    """

    def __init__(self, backend: str | None, profile: str | None, device: str | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="npu-", dir=_socket_folder()))
        self.endpoint = Endpoint(path=str(self._folder / _SOCKET))
        self._command = [
            *(sys.executable, "-m", "npu_server", "serve", "--listen", self.endpoint.target, "--http", "off"),
            *("--exit-with-stdin", *_flag("backend", backend), *_flag("profile", profile)),
            *_flag("device", device),
        ]
        self._lock = threading.Lock()
        self._closed = False
        self._child: _Child | None = None
        _servers.add(self)
        try:
            self.ensure_running()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._child is not None
        return self._child.process.pid

    @property
    def threads(self) -> int:
        """Threads that it computes with."""
        return _threads()

    def ensure_running(self) -> None:
        """Starts the server if it does not run.

        Raises:
            ServerUnavailable: it does not start.
        """
        with self._lock:
            if self._closed:
                return
            if self._child is not None:
                status = self._child.process.poll()
                if status is None:
                    return
                log.warning("the embedded server %s", self._child.last_words(status))
                self._child.stop()
            self._child = _Child(self._command)
            self._child.wait_until_listening()

    def close(self) -> None:
        """Stops the server; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._child is not None:
                self._child.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Leaves the server to the process that this one was forked from, which may hold the lock."""
        self._lock = threading.Lock()
        self._closed = True
        if self._child is not None:
            self._child.let_go()


class _Child:
    """One server process, and the thread that reads what it prints, so that it never waits for a reader."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=_environment(),
            # Ctrl-C at the terminal is the parent's to handle.
            start_new_session=True,
        )
        self._said = threading.Condition()
        self._tail = b""
        self._listening = self._silent = False
        threading.Thread(target=self._listen, name="npu-embedded-log", daemon=True).start()

    def wait_until_listening(self) -> None:
        """Waits for the server's word that it serves."""
        with self._said:
            heard = self._said.wait_for(lambda: self._listening or self._silent, _START_TIMEOUT_S)
        if not heard:
            raise ServerUnavailable(f"the embedded server is silent for {_START_TIMEOUT_S:g} s{self._log()}")
        if not self._listening and self.process.wait() == _CALLED_WRONGLY:
            # Its flags are ours: what is wrong is what the server needs and does not find.
            raise MissingPackage(self._tail.decode(errors="replace").strip().removeprefix("error: "))
        if not self._listening:
            raise ServerUnavailable(f"the embedded server {self.last_words(self.process.wait())}")

    def last_words(self, status: int) -> str:
        """How it ended and what it said before."""
        return f"stopped with exit status {status}{self._log()}"

    def stop(self) -> None:
        """Ends the process: asks once, for a second signal would end it before it has closed its device."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._input.close()

    def let_go(self) -> None:
        """Closes a forked process's copies of the pipes; the reading thread was not forked."""
        self._input.close()
        self._output.close()

    @property
    def _input(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _listen(self) -> None:
        line = b""
        while piece := self._output.read(65_536):
            *whole, line = (line[-_LOG_TAIL_BYTES:] + piece).split(b"\n")
            for text in whole:
                log.debug("%s", text.decode(errors="replace"))
            with self._said:
                self._tail = (self._tail + piece)[-_LOG_TAIL_BYTES:]
                self._listening |= b"listening on" in self._tail
                self._said.notify_all()
        with self._said:
            self._silent = True
            self._said.notify_all()
        self._output.close()

    def _log(self) -> str:
        lines = self._tail.decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "; the end of its log:\n" + "\n".join(lines)


_servers: "weakref.WeakSet[EmbeddedServer]" = weakref.WeakSet()


def _abandon_servers() -> None:
    for server in _servers:
        server.abandon()


os.register_at_fork(after_in_child=_abandon_servers)


def _flag(name: str, value: str | None) -> tuple[str, ...]:
    return () if value is None else (f"--{name}", value)


def _socket_folder() -> str:
    """Where temporary files go, if a socket's path in there is short enough; else /tmp."""
    room = MAX_SOCKET_PATH_BYTES - len(f"/npu-xxxxxxxx/{_SOCKET}")
    for folder in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(folder)) <= room and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise InvalidInput(
        f"the path of a unix socket has at most {MAX_SOCKET_PATH_BYTES} bytes, which leaves {room} for the "
        f"folder of temporary files; {tempfile.gettempdir()} is longer: set TMPDIR to a shorter one"
    )


def _threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) // 2)


def _environment() -> dict[str, str]:
    """The child's environment: half of the cores, and an allocator that keeps big buffers mapped."""
    # NPU_* speaks to servers and clients that the user starts; this one is told everything by flags.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NPU_")}
    return inherited | {
        "OMP_NUM_THREADS": str(_threads()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    }
