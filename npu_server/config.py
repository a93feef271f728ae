"""Settings of the server's commands; `npu_wire.settings` says where they come from."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from npu_server.service.quotas import Limits
from npu_wire.channel import parse_endpoint
from npu_wire.settings import ServerAccess, Settings


class Device(BaseModel):
    """The NPU."""

    backend: str = Field("emulator", description="name of an installed backend")
    profile: str = Field(
        "tflm", title="NAME|FILE", description="numerics profile: a name or the path of a TOML file"
    )
    device: str = Field("cpu", description="where the backend computes: cpu, cuda, cuda:1")
    threads: int = Field(0, ge=0, description="threads of the backend's kernels; 0: the library's default")
    backend_option: dict[str, str] = Field({}, description="for the backend; repeatable")


class Addresses(BaseModel):
    """Where it answers."""

    listen: str = Field(
        "127.0.0.1:50051", title="ADDRESS", description="gRPC: HOST:PORT (0: any port) or unix:PATH"
    )
    http: str = Field(
        "127.0.0.1:8080", title="ADDRESS", description="status and metrics over HTTP; off disables"
    )
    http_hosts: str = Field(
        "",
        title="NAMES",
        description="names, with commas, that HTTP requests may call it by; localhost and IPs always may",
    )


class Access(BaseModel):
    """Who may call."""

    insecure: bool = Field(False, description="allow addresses that other machines reach without TLS")
    tls_cert: Path | None = Field(None, description="PEM file of the server's certificate chain")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authority that clients must be from"
    )
    token_file: Path | None = Field(None, description="file with the bearer token that every call must carry")


class Quotas(BaseModel):
    """What clients may take."""

    max_sessions: int = Field(16, ge=1, le=1024, description="sessions open at the same time")
    max_model_bytes: int = Field(2**30, ge=1, description="of a model")
    max_in_flight: int = Field(4, ge=1, le=1024, description="unanswered batches of a session")
    max_session_bytes: int = Field(
        2**30, ge=1, description="held for a session: updates, batches, unread answers"
    )
    max_server_bytes: int = Field(2**32, ge=1, description="held for all sessions together")
    max_shared_bytes: int = Field(
        2**31, ge=0, description="of memory shared with clients on this host, all together; 0: none"
    )


class Patience(BaseModel):
    """How long it waits."""

    lease_s: float = Field(60.0, gt=0, allow_inf_nan=False, description="a session idle so long is released")
    stall_s: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="with a client that stalls in the middle of a call"
    )
    grace_s: float = Field(10.0, ge=0, allow_inf_nan=False, description="to finish work at shutdown")
    probe_s: float = Field(30.0, gt=0, allow_inf_nan=False, description="between probes of the device")


class Process(BaseModel):
    """The process."""

    exit_with_stdin: bool = Field(
        False,
        description="shut down when standard input closes or the parent process is gone, and remove the unix "
        "socket's folder if it is empty then",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="of standard error")


class ServeConfig(Device, Addresses, Access, Quotas, Patience, Process):
    """Serve an NPU over gRPC."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key come together; give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        for name, size in (("model", self.max_model_bytes), ("session", self.max_session_bytes)):
            if size > self.max_server_bytes:
                raise ValueError(
                    f"--max-{name}-bytes {size} is more than --max-server-bytes {self.max_server_bytes}; "
                    "give a larger --max-server-bytes"
                )
        endpoint = parse_endpoint(self.listen)
        if not endpoint.is_loopback and self.tls_cert is None and not self.insecure:
            raise ValueError(
                f"--listen {self.listen} can be reached from other machines; give --tls-cert and --tls-key, "
                "or --insecure if the network is yours alone"
            )
        if self.http_enabled:
            http = parse_endpoint(self.http)
            if http.path:
                raise ValueError(f"--http {self.http} must be HOST:PORT, or off")
            if not http.is_loopback and not self.insecure:
                raise ValueError(
                    f"--http {self.http} can be reached from other machines and speaks no TLS; give "
                    "--insecure if the network is yours alone, or --http off"
                )
        return self

    @property
    def http_enabled(self) -> bool:
        """Whether there is an HTTP side."""
        return self.http not in ("", "off")

    @property
    def http_host_names(self) -> tuple[str, ...]:
        """Host names that HTTP requests may call the server by."""
        return tuple(name.strip() for name in self.http_hosts.split(",") if name.strip())

    @property
    def limits(self) -> Limits:
        """The quotas."""
        return Limits(
            max_sessions=self.max_sessions,
            max_model_bytes=self.max_model_bytes,
            max_in_flight=self.max_in_flight,
            max_session_bytes=self.max_session_bytes,
            max_server_bytes=self.max_server_bytes,
            lease_s=self.lease_s,
            stall_s=self.stall_s,
        )


class ServeSettings(ServeConfig, Settings):  # type: ignore[misc]  # pydantic merges both `model_config`s
    """Serve an NPU over gRPC."""


class DescribeSettings(ServerAccess, Settings):
    """Show what the NPU behind an endpoint is."""

    endpoint: str = Field("127.0.0.1:50051", title="ADDRESS", description="HOST:PORT or unix:PATH")
    json_: bool = Field(False, description="print JSON instead of a table")
    timeout_s: float = Field(5.0, gt=0, description="wait so long for the answer")


class ProfilesSettings(Settings):
    """List the numerics profiles that ship."""

    json_: bool = Field(False, description="print JSON instead of lines")


class ShowProfileSettings(Settings):
    """Explain what every key of a profile says."""

    positional: ClassVar[tuple[str, ...]] = ("profile",)

    profile: str = Field(title="NAME|FILE", description="a shipped profile, or the path of a .toml file")
    json_: bool = Field(False, description="print JSON instead of a table")


class ConformanceSettings(Device, ServerAccess, Settings):
    """Examine a backend: operators, contract, and the same over gRPC. Exit status 0: all passed, 1: not."""

    backend: str | None = Field(  # type: ignore[assignment]  # here it may be left out
        None, description="name of an installed backend; none: only the endpoint's"
    )
    threads: int = Field(1, ge=0, description="threads of the backend's kernels; 0: the library's default")
    endpoint: str | None = Field(
        None, title="ADDRESS", description="a server to examine; none: starts one on a unix socket"
    )
    json_: Path | None = Field(None, description="write the results to this file as well; -: print JSON")
    # On the suite's models per-channel affine arithmetic is within 5 LSB of float, power-of-two scales per
    # tensor with flooring shifts within 14.
    tolerance_lsb: int = Field(
        16, ge=1, le=127, description="closeness to float demanded of arithmetic that is no profile of ours"
    )
    timeout_s: float = Field(60.0, gt=0, description="wait so long for each answer of the server")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backend is None and self.endpoint is None:
            raise ValueError("give --backend NAME, --endpoint ADDRESS or both")
        return self
