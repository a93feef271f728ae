"""Settings of the server: flags > environment NPU_* > TOML file (--config) > defaults."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from npu_server.service.sessions import Limits
from npu_wire.channel import parse_endpoint
from npu_wire.errors import InvalidInput

T = TypeVar("T", bound=BaseSettings)


class ServeConfig(BaseModel):
    """Serve an NPU over gRPC."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str = Field("emulator", description="name of an installed backend")
    profile: str = Field("tflm", description="numerics profile: a name or the path of a TOML file")
    device: str = Field("cpu", description="where the backend computes: cpu, cuda, cuda:1")
    threads: int = Field(0, ge=0, description="threads of the backend's kernels; 0: the library's default")
    backend_option: dict[str, str] = Field({}, description="key=value for the backend, repeatable")
    listen: str = Field("127.0.0.1:50051", description="gRPC address: HOST:PORT (0: any port) or unix:PATH")
    http: str = Field("127.0.0.1:8080", description="HTTP address of status and metrics; off disables")
    http_hosts: str = Field(
        "", description="names, with commas, that HTTP requests may call it by; localhost and IPs always may"
    )
    insecure: bool = Field(False, description="allow addresses that other machines reach without TLS")
    tls_cert: Path | None = Field(None, description="PEM file of the server's certificate chain")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of the authority that clients must be from"
    )
    token_file: Path | None = Field(None, description="file with the bearer token that every call must carry")
    max_sessions: int = Field(16, ge=1, le=1024, description="sessions open at the same time")
    max_model_bytes: int = Field(2**30, ge=1, description="bytes of a model")
    max_in_flight: int = Field(4, ge=1, le=1024, description="unanswered batches of a session")
    max_session_bytes: int = Field(
        2**30, ge=1, description="bytes held for a session: updates, batches, unread answers"
    )
    max_server_bytes: int = Field(2**32, ge=1, description="bytes held for all sessions together")
    lease_s: float = Field(60.0, gt=0, allow_inf_nan=False, description="a session idle so long is released")
    stall_s: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="patience with a client that stalls in the middle of a call",
    )
    grace_s: float = Field(10.0, ge=0, allow_inf_nan=False, description="time to finish work at shutdown")
    probe_s: float = Field(30.0, gt=0, allow_inf_nan=False, description="time between probes of the device")
    exit_with_stdin: bool = Field(
        False,
        description="shut down when standard input closes or the parent process is gone, and remove the unix "
        "socket's folder if it is empty then",
    )
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG to ERROR")

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


class _Settings(BaseSettings):
    """How a command's settings are found."""

    model_config = SettingsConfigDict(
        env_prefix="NPU_",
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment before file; the command line comes before both by itself."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


class ServeSettings(_Settings, ServeConfig):  # type: ignore[misc]  # pydantic merges both `model_config`s
    """Serve an NPU over gRPC. Flags go before environment variables NPU_*, then the file, then defaults."""

    config: Path | None = Field(None, description="TOML file with any of these settings")


class DescribeSettings(_Settings):
    """Show what the NPU behind an endpoint is."""

    endpoint: str = Field("127.0.0.1:50051", description="HOST:PORT or unix:PATH")
    json_output: bool = Field(False, alias="json", description="print JSON instead of a table")
    tls: bool = Field(False, description="encrypt, trusting the system's authorities")
    tls_ca: Path | None = Field(
        None, description="PEM file of the authority that signed the server's certificate"
    )
    tls_cert: Path | None = Field(None, description="PEM file of the client's own certificate")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    token_file: Path | None = Field(None, description="file with the bearer token")
    timeout_s: float = Field(5.0, gt=0, description="wait so long for the answer")


class ConformanceSettings(_Settings):
    """Examine a backend: operators, contract, and the same over gRPC. Exit status 0: all passed, 1: not."""

    backend: str | None = Field(None, description="name of an installed backend; none: only the endpoint's")
    profile: str = Field("tflm", description="numerics profile: a name or the path of a TOML file")
    device: str = Field("cpu", description="where the backend computes: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=0, description="threads of the backend's kernels; 0: the library's default")
    backend_option: dict[str, str] = Field({}, description="key=value for the backend, repeatable")
    endpoint: str | None = Field(None, description="a server to examine; none: starts one on a unix socket")
    json_file: Path | None = Field(None, alias="json", description="write the results to this file as well")
    # On the suite's models per-channel affine arithmetic is within 5 LSB of float, power-of-two scales per
    # tensor with flooring shifts within 14.
    tolerance_lsb: int = Field(
        16, ge=1, le=127, description="closeness to float demanded of arithmetic that is no profile of ours"
    )
    tls: bool = Field(False, description="encrypt, trusting the system's authorities")
    tls_ca: Path | None = Field(
        None, description="PEM file of the authority that signed the server's certificate"
    )
    tls_cert: Path | None = Field(None, description="PEM file of the client's own certificate")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    token_file: Path | None = Field(None, description="file with the bearer token")
    timeout_s: float = Field(60.0, gt=0, description="wait so long for each answer of the server")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backend is None and self.endpoint is None:
            raise ValueError("give --backend NAME, --endpoint ADDRESS or both")
        return self


def load_serve_config(arguments: Sequence[str]) -> ServeConfig:
    """Settings of `npu-server serve`.

    Raises:
        InvalidInput: the TOML file is missing.
        pydantic.ValidationError: a setting is illegal.
        SystemExit: an unknown flag, or --help.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--config", default=os.environ.get("NPU_CONFIG"))
    path = scan.parse_known_args(arguments)[0].config
    if path is not None and not Path(path).is_file():
        raise InvalidInput(f"--config {path}: no such file")

    class FromFile(ServeSettings):
        __doc__ = ServeSettings.__doc__
        model_config = SettingsConfigDict(toml_file=path)

    settings = _run(FromFile, arguments, "npu-server serve")
    return ServeConfig(**settings.model_dump(exclude={"config"}))


def load_describe_settings(arguments: Sequence[str]) -> DescribeSettings:
    """Settings of `npu-server describe`; same errors as `load_serve_config`."""
    return _run(DescribeSettings, arguments, "npu-server describe")


def load_conformance_settings(arguments: Sequence[str]) -> ConformanceSettings:
    """Settings of `npu-server conformance`; same errors as `load_serve_config`."""
    return _run(ConformanceSettings, arguments, "npu-server conformance")


def _run(settings: type[T], arguments: Sequence[str], program: str) -> T:
    named: Any = type(settings.__name__, (settings,), {"__doc__": settings.__doc__, "__module__": __name__})
    named.model_config = {**settings.model_config, "cli_prog_name": program}
    settings_found: T = CliApp.run(named, cli_args=list(arguments))
    return settings_found
