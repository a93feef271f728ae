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

from pydantic import ValidationError
from rich.console import Console

from npu_server.config import (
    ServeConfig,
    load_conformance_settings,
    load_describe_settings,
    load_serve_config,
)
from npu_server.registry import create_backend
from npu_server.seam import BackendOptions
from npu_server.service.allocator import use_one_arena
from npu_server.service.words import LineFormatter
from npu_wire.channel import parse_endpoint
from npu_wire.errors import InvalidInput, NpuError

_USAGE = """usage: npu-server COMMAND [options]

An NPU as a quantized forward service.

commands:
  serve        serve an NPU over gRPC
  describe     show what the NPU behind an endpoint is
  profiles     list the numerics profiles; profiles show NAME: what every key of one says
  conformance  examine a backend: arithmetic, contract, wire

npu-server COMMAND --help shows the options of a command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failed, 2 called wrongly."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    commands = {"serve": _serve, "describe": _describe, "profiles": _profiles, "conformance": _conformance}
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command not in commands:
        print(_USAGE + (f"\nerror: unknown command '{command}'" if command else ""), file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except ValidationError as error:
        for problem in error.errors():
            name = (
                "--" + "-".join(str(part) for part in problem["loc"]).replace("_", "-") + ": "
                if problem["loc"]
                else ""
            )
            print(f"error: {name}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 2
    except NpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _serve(arguments: Sequence[str]) -> NoReturn:
    config = load_serve_config(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=config.log_level, handlers=[handler])
    parent = os.getppid()
    use_one_arena()
    stop = _stop_on_signals()
    # Imported here so that `--help` and the other commands do not wait for gRPC's and FastAPI's servers.
    app = importlib.import_module("npu_server.app")
    backend = create_backend(config.backend, _backend_options(config))
    with app.serve(backend, config) as server:
        print(f"listening on {server.address}", flush=True)
        if server.http_address is not None:
            print(f"http on {server.http_address}", flush=True)
        if config.exit_with_stdin:
            threading.Thread(target=_stop_with_parent, args=(stop, parent), daemon=True).start()
        stop.wait()
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


def _describe(arguments: Sequence[str]) -> int:
    settings = load_describe_settings(arguments)
    importlib.import_module("npu_server.describe").describe(settings, Console())
    return 0


def _conformance(arguments: Sequence[str]) -> int:
    settings = load_conformance_settings(arguments)
    passed = importlib.import_module("npu_server.conformance.command").conformance(settings, Console())
    return 0 if passed else 1


def _profiles(arguments: Sequence[str]) -> int:
    pages, console = importlib.import_module("npu_server.profile_pages"), Console()
    match arguments:
        case []:
            pages.print_profiles(console)
        case ["show", name] if not name.startswith("-"):
            pages.print_profile(name, console)
        case ["-h" | "--help"]:
            print("usage: npu-server profiles [show NAME]\n\nNAME: a shipped profile, or a path (.toml)")
        case _:
            raise InvalidInput(
                f"npu-server profiles {' '.join(arguments)}: write `npu-server profiles` or "
                "`npu-server profiles show NAME`"
            )
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


if __name__ == "__main__":
    sys.exit(main())
