"""`npu-server conformance`."""

import json
import sys
from pathlib import Path

from rich.console import Console

from npu_server.config import ConformanceSettings
from npu_server.conformance.suite import run_suite
from npu_server.conformance.wire import RemoteTarget
from npu_server.registry import create_backend
from npu_server.seam import Backend, BackendOptions
from npu_wire.errors import InvalidInput

_STANDARD_OUTPUT = Path("-")


def conformance(settings: ConformanceSettings, console: Console) -> bool:
    """Runs the suite, prints it, writes JSON where asked to, and tells whether all passed.

    Raises:
        NpuError: the backend cannot be had, the server does not answer, or the file cannot be written.
    """
    name = settings.backend
    options = BackendOptions(settings.profile, settings.device, settings.threads, settings.backend_option)

    def make_backend() -> Backend:
        return create_backend(name or "", options)

    def connect(endpoint: str) -> RemoteTarget:
        return RemoteTarget(endpoint, settings.timeout_s, settings.security())

    report = run_suite(
        make_backend if name else None,
        settings.endpoint or "",
        connect,
        settings.profile,
        settings.tolerance_lsb,
    )
    document = json.dumps(report.as_dict(), indent=2) + "\n"
    if settings.json_ == _STANDARD_OUTPUT:
        sys.stdout.write(document)
        return report.passed
    report.print(console)
    if settings.json_ is not None:
        try:
            settings.json_.write_text(document, "utf-8")
        except OSError as error:
            raise InvalidInput(f"--json {settings.json_}: cannot be written ({error.strerror})") from None
    return report.passed
