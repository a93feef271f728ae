"""The command `npu-server`."""

import contextlib
import importlib
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from npu_server.config import (
    ConformanceSettings,
    DescribeSettings,
    ProfilesSettings,
    ServeConfig,
    ServeSettings,
    ShowProfileSettings,
)
from npu_server.registry import create_backend
from npu_server.seam import BackendOptions
from npu_server.service.words import LineFormatter
from npu_wire.allocator import keep_freed_memory, use_one_arena
from npu_wire.channel import parse_endpoint
from npu_wire.program import Command, Program

_ATTENTION_S = 1.0
"""How often the main thread looks up: the kernel may give a signal to another thread, which wakes nobody."""

_SWITCH_INTERVAL_S = 0.0005
"""Python's 5 ms are what each message may wait for a device that prepares weights, several times over."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; see `Program.main`."""
    return PROGRAM.main(arguments)


def _serve(config: ServeConfig, _called: str) -> NoReturn:
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level, handlers=[handler])
    parent = os.getppid()
    use_one_arena()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    keep_freed_memory()
    stop = _stop_on_signals()
    app = importlib.import_module("npu_server.app")
    backend = create_backend(config.backend, _backend_options(config))
    with app.serve(backend, config) as server:
        print(f"listening on {server.address}", flush=True)
        if server.http_address is not None:
            print(f"http on {server.http_address}", flush=True)
        if config.exit_with_stdin:
            threading.Thread(target=_stop_with_parent, args=(stop, parent), daemon=True).start()
        while not stop.wait(_ATTENTION_S):
            pass
    if config.exit_with_stdin:
        _remove_folder_of(server.address)
    # All is closed. A model that still compiles cannot be stopped, and Python would wait for its thread.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _remove_folder_of(address: str) -> None:
    """Removes the folder that a parent has made for our unix socket, if nothing else is in there."""
    path = parse_endpoint(address).path
    if path:
        with contextlib.suppress(OSError):
            Path(path).parent.rmdir()


# Imported in the commands: `--help` does not wait for gRPC's and FastAPI's servers, and a package that is
# missing is missed by those that need it.
def _describe(settings: DescribeSettings, _called: str) -> int:
    importlib.import_module("npu_server.describe").describe(settings, Console())
    return 0


def _conformance(settings: ConformanceSettings, _called: str) -> int:
    passed = importlib.import_module("npu_server.conformance.command").conformance(settings, Console())
    return 0 if passed else 1


def _profiles(settings: ProfilesSettings, _called: str) -> int:
    importlib.import_module("npu_server.profile_pages").print_profiles(Console(), settings.json_)
    return 0


def _show_profile(settings: ShowProfileSettings, _called: str) -> int:
    pages = importlib.import_module("npu_server.profile_pages")
    pages.print_profile(settings.profile, Console(), settings.json_)
    return 0


def _backend_options(config: ServeConfig) -> BackendOptions:
    return BackendOptions(config.profile, config.device, config.threads, config.backend_option)


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM or SIGINT sets; the second signal ends the process at once."""
    stop = threading.Event()
    signalled = threading.Event()

    def handle(number: int, _frame: object) -> None:
        # Not `stop`, which the end of standard input sets as well: a parent that closes it and then sends a
        # signal says one thing twice, and the device has to be closed.
        if signalled.is_set():
            os._exit(128 + number)
        signalled.set()
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


def _stop_with_parent(stop: threading.Event, parent: int) -> None:
    """Sets `stop` when standard input ends or the parent is gone: its forks hold the input open after it."""
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 1.0)[0] and not os.read(sys.stdin.fileno(), 4096):
            break
    stop.set()


PROGRAM = Program(
    "npu-server",
    "An NPU as a quantized forward service.",
    {
        "serve": Command(ServeSettings, _serve, "server"),
        "describe": Command(DescribeSettings, _describe, "server"),
        "profiles": Command(ProfilesSettings, _profiles, "server"),
        "profiles show": Command(ShowProfileSettings, _show_profile, "server"),
        "conformance": Command(ConformanceSettings, _conformance, "server"),
    },
)

if __name__ == "__main__":
    sys.exit(main())
