"""Puts the server together, and takes it apart in the right order."""

import logging
import socket
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from npu_server.config import ServeConfig
from npu_server.dashboard import http_server
from npu_server.dashboard.pages import create_dashboard
from npu_server.seam import Backend, Health
from npu_server.service.device import Device
from npu_server.service.health import HealthService
from npu_server.service.interceptors import LISTENERS, SILENT_CALLS, CallInterceptor
from npu_server.service.rendezvous import Rendezvous
from npu_server.service.servicer import NpuService, add_to
from npu_server.service.sessions import SessionTable
from npu_server.service.stalls import StallWatch
from npu_server.service.watchdog import Watchdog
from npu_server.telemetry import DeviceStatus, Status, Telemetry
from npu_wire.channel import parse_endpoint, read_token, server_credentials, server_options
from npu_wire.errors import InvalidInput
from npu_wire.v1 import npu_pb2

log = logging.getLogger(__name__)

SERVICE_NAME: str = npu_pb2.DESCRIPTOR.services_by_name["NpuService"].full_name
# Threads of each session: its stream, one that it has replaced, a model that is being compiled.
_CALLS_OF_A_SESSION = 3
# Threads for those who say what they want and have their answer at once: describing, releasing, health.
_QUICK_CALLS = 16
SERVICES = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
_CLOSING_S = 3.0  # for programs and device, after the grace
# The longest that a shutdown takes beyond the grace: who kills the process (compose, Kubernetes) adds it.
SHUTDOWN_S = _CLOSING_S + http_server.STOP_S


class RunningServer:
    """A server that serves until it is closed; a context manager.

    Args:
        backend: the device; opened here, closed by `close`.
        config: settings.
        clock: monotonic seconds, for leases.

    Attributes:
        address: where gRPC listens, with the port that was chosen.
        http_address: where HTTP listens; None: nowhere.
        rendezvous: where clients on this host get shared memory.

    Raises:
        InvalidInput: an address cannot be bound, or a file cannot be read.
        DeviceFault: the device is not well.
    """

    def __init__(
        self, backend: Backend, config: ServeConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        token = read_token(config.token_file) if config.token_file else None
        self._config = config
        self._closed = False
        self._socket_path: Path | None = None
        self._serving = False
        self._trouble = ""
        self._http: http_server.HttpServer | None = None
        self.http_address: str | None = None
        self.telemetry = Telemetry()
        self._device = Device(backend)
        self.sessions = SessionTable(self._device, config.limits, clock)
        self._health = HealthService("", *SERVICES)
        self._watchdog = Watchdog(self._device.probe, config.probe_s, self._follow)
        self._stalls = StallWatch()
        self.rendezvous = Rendezvous(config.max_shared_bytes)
        self._calls = CallInterceptor(
            self.telemetry, self._stalls, config.stall_s, token, self._watchdog.suspect
        )
        self._server = self._build()
        self.telemetry.watch(
            self.sessions.count,
            self._device.worker.depth,
            self.sessions.held_bytes,
            lambda: self.rendezvous.committed,
        )
        try:
            self.address = self._bind()
            self._device.open()
            self._add_service()
            self._server.start()
            self.sessions.start_reaper()
            if config.http_enabled:
                http = parse_endpoint(config.http)
                app = create_dashboard(self.status, self.telemetry.registry)
                self._http = http_server.HttpServer(app, http.host, http.port, config.http_host_names)
                self.http_address = self._http.address
            self._set_serving(True)
            self._watchdog.start()
            mark = self._device.capabilities.fingerprint
            log.info(
                "serving %s, profile %s (%.12s), on %s",
                mark.backend,
                mark.profile,
                mark.profile_hash,
                self.address,
            )
        except BaseException:
            self.close(grace_s=0.0)
            raise

    def status(self) -> Status:
        """A snapshot of everything."""
        mark = self._device.capabilities.fingerprint
        device = DeviceStatus(
            backend=mark.backend,
            model=f"{mark.vendor} {mark.model}".strip(),
            profile=mark.profile,
            profile_hash=mark.profile_hash,
            location=self._device.capabilities.location,
            serving=self._serving,
            trouble=self._trouble,
            failed_kernels=self._device.capabilities.failed_kernels,
        )
        return self.telemetry.status(device, self.sessions.status(), self._device.worker.depth())

    def close(self, grace_s: float | None = None) -> None:
        """Shuts down: health, calls, device's queue, programs, device. Idempotent.

        Args:
            grace_s: seconds for calls and what they have queued; None: as configured. Then jobs end at their
                next layer, and programs and device have 3 s to be closed.
        """
        if self._closed:
            return
        self._closed = True
        grace = self._config.grace_s if grace_s is None else grace_s
        self._watchdog.stop()
        self._set_serving(False)
        self._health.close()
        self.sessions.drain()
        # Ends at once, whatever the grace, when no call is left but those that would never end, like Watch.
        stopped = self._server.stop(grace)
        self._calls.wait_until_idle(grace)
        self._server.stop(None)
        stopped.wait()
        self._stalls.close()
        self.rendezvous.close()
        end = time.monotonic() + _CLOSING_S
        self.sessions.close(_CLOSING_S)
        if not self._device.close(end - time.monotonic()):
            log.error("the device is still at work after %g s; it is left as it is", grace + _CLOSING_S)
        if self._http is not None:
            self._http.close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _build(self) -> grpc.Server:
        config = self._config
        calls = SILENT_CALLS + LISTENERS + _QUICK_CALLS + _CALLS_OF_A_SESSION * config.max_sessions
        server = grpc.server(
            futures.ThreadPoolExecutor(calls, thread_name_prefix="npu-grpc"),
            options=server_options(),
            interceptors=[self._calls],
            # Beyond what admission lets in; a call beyond the pool would wait unseen, so it is refused.
            maximum_concurrent_rpcs=calls,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(SERVICES, server)
        return server

    def _add_service(self) -> None:
        for kernel in self._device.capabilities.failed_kernels:
            self.telemetry.failed_kernel(kernel)
        limits = self._config.limits
        service = NpuService(
            self._device, self.sessions, limits, self.telemetry, self._stalls, self.rendezvous
        )
        add_to(self._server, service)

    def _bind(self) -> str:
        config = self._config
        endpoint = parse_endpoint(config.listen)
        if endpoint.path:
            _refuse_if_served(endpoint.path)
        try:
            if config.tls_cert is not None and config.tls_key is not None:
                credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
                port = self._server.add_secure_port(endpoint.target, credentials)
            else:
                port = self._server.add_insecure_port(endpoint.target)
        except RuntimeError as error:
            raise InvalidInput(
                f"cannot listen on {endpoint.target} (is it in use?); choose another --listen ({error})"
            ) from None
        if endpoint.path:
            self._socket_path = Path(endpoint.path)
            return endpoint.target
        return replace(endpoint, port=port).target

    def _set_serving(self, serving: bool) -> None:
        self._serving = serving
        self._health.set_serving(serving)

    def _follow(self, health: Health) -> None:
        self._trouble = "" if health.ok else health.detail or "it does not say why"
        self._set_serving(health.ok)


def _refuse_if_served(path: str) -> None:
    """Refuses the path of a socket that somebody serves: gRPC would take it over without a word."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # nothing there, or left behind by a server that was killed
    raise InvalidInput(f"cannot listen on unix:{path}: another server is there; choose another --listen")


def serve(
    backend: Backend, config: ServeConfig, clock: Callable[[], float] = time.monotonic
) -> RunningServer:
    """Starts a server and returns once it serves; see `RunningServer`."""
    return RunningServer(backend, config, clock)
