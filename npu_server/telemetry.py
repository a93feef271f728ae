"""Counts what the server does; the dashboard and Prometheus read snapshots of it."""

import statistics
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_RECENT = 256
_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


@dataclass(frozen=True)
class DeviceStatus:
    """Identity and state of the device.

    Attributes:
        backend: name of the backend.
        model: vendor and model.
        profile: name of the numerics profile.
        profile_hash: identity of the arithmetic.
        location: where it computes.
        serving: False during start and shutdown, and while the device is not well.
        trouble: what the device says when it is not well.
        failed_kernels: kernels that failed the start-up test; slower exact ones stand in for them.
    """

    backend: str
    model: str
    profile: str
    profile_hash: str
    location: str
    serving: bool
    trouble: str = ""
    failed_kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerStatus:
    """Latency of one layer in milliseconds: last batch, mean of all, median of the last 256."""

    name: str
    op: str
    batches: int
    last_ms: float
    mean_ms: float
    p50_ms: float


@dataclass(frozen=True)
class SessionStatus:
    """One session."""

    session_id: str
    attached: bool
    weights_version: int
    batches: int
    age_s: float
    layers: tuple[LayerStatus, ...]


@dataclass(frozen=True)
class Status:
    """The whole server at one moment."""

    device: DeviceStatus
    uptime_s: float
    queue_depth: int
    batches: int
    bytes_in: int
    bytes_out: int
    errors: dict[str, int]
    sessions: tuple[SessionStatus, ...]


@dataclass
class LayerLatency:
    """Running latency of one layer of one session, in nanoseconds."""

    name: str
    op: str
    batches: int = 0
    total_ns: int = 0
    recent_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, duration_ns: int) -> None:
        """Counts one run of the layer."""
        self.batches += 1
        self.total_ns += duration_ns
        self.recent_ns.append(duration_ns)

    def status(self) -> LayerStatus:
        """A snapshot."""
        recent = list(self.recent_ns)
        batches = max(1, self.batches)
        return LayerStatus(
            name=self.name,
            op=self.op,
            batches=self.batches,
            last_ms=recent[-1] / 1e6 if recent else 0.0,
            mean_ms=self.total_ns / batches / 1e6,
            p50_ms=statistics.median(recent) / 1e6 if recent else 0.0,
        )


class Telemetry:
    """Counters of one server, with a Prometheus registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._batches = self._bytes_in = self._bytes_out = 0
        self._errors: Tally[str] = Tally()
        self._requests = Counter(
            "npu_requests", "gRPC calls by method and status", ("method", "code"), registry=self.registry
        )
        self._duration = Histogram(
            "npu_request_seconds",
            "Duration of gRPC calls",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_count = Counter("npu_batches", "Batches computed", registry=self.registry)
        self._batch_time = Histogram(
            "npu_batch_device_seconds", "Device time of a batch", buckets=_SECONDS, registry=self.registry
        )
        self._wait_time = Histogram(
            "npu_batch_queued_seconds",
            "Wait of a batch for the device",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._layer_time = Histogram(
            "npu_layer_seconds", "Device time of a layer", ("op",), buckets=_SECONDS, registry=self.registry
        )
        self._bytes = Counter(
            "npu_tensor_bytes", "Tensor bytes on the wire", ("direction",), registry=self.registry
        )
        self._error_count = Counter("npu_errors", "Errors by class", ("error",), registry=self.registry)
        self._sessions = Gauge("npu_sessions", "Open sessions", registry=self.registry)
        self._depth = Gauge("npu_queue_depth", "Jobs that wait for the device", registry=self.registry)
        self._shared = Gauge(
            "npu_shared_bytes",
            "Memory that the server shares with clients on its host",
            registry=self.registry,
        )
        self._held = Gauge(
            "npu_held_bytes", "Requests and unread answers that the server holds", registry=self.registry
        )
        self._failed_kernels = Gauge(
            "npu_failed_kernel",
            "1: this kernel failed the start-up test, a slower exact one stands in for it",
            ("kernel",),
            registry=self.registry,
        )

    def watch(
        self,
        sessions: Callable[[], int],
        queue_depth: Callable[[], int],
        held_bytes: Callable[[], int],
        shared_bytes: Callable[[], int],
    ) -> None:
        """Tells where the current numbers of sessions, waiting jobs, held and shared bytes can be asked."""
        self._sessions.set_function(lambda: float(sessions()))
        self._depth.set_function(lambda: float(queue_depth()))
        self._held.set_function(lambda: float(held_bytes()))
        self._shared.set_function(lambda: float(shared_bytes()))

    def failed_kernel(self, name: str) -> None:
        """Notes a kernel that failed the start-up test."""
        self._failed_kernels.labels(name).set(1)

    def request(self, method: str, code: str, seconds: float) -> None:
        """Counts one finished gRPC call."""
        self._requests.labels(method, code).inc()
        self._duration.labels(method).observe(seconds)

    def error(self, class_name: str) -> None:
        """Counts one error by its class."""
        self._error_count.labels(class_name).inc()
        with self._lock:
            self._errors[class_name] += 1

    def layer(self, latency: LayerLatency, duration_ns: int) -> None:
        """Counts one run of a layer."""
        self._layer_time.labels(latency.op).observe(duration_ns / 1e9)
        latency.add(duration_ns)

    def batch(self, queued_ns: int, device_ns: int) -> None:
        """Counts one finished batch."""
        self._batch_count.inc()
        self._batch_time.observe(device_ns / 1e9)
        self._wait_time.observe(queued_ns / 1e9)
        with self._lock:
            self._batches += 1

    def received(self, count: int) -> None:
        """Counts tensor bytes that came in."""
        self._bytes.labels("in").inc(count)
        with self._lock:
            self._bytes_in += count

    def sent(self, count: int) -> None:
        """Counts tensor bytes that went out."""
        self._bytes.labels("out").inc(count)
        with self._lock:
            self._bytes_out += count

    def status(self, device: DeviceStatus, sessions: tuple[SessionStatus, ...], queue_depth: int) -> Status:
        """A snapshot of the counters together with what the caller knows."""
        with self._lock:
            return Status(
                device=device,
                uptime_s=time.monotonic() - self._started,
                queue_depth=queue_depth,
                batches=self._batches,
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                errors=dict(self._errors),
                sessions=sessions,
            )
