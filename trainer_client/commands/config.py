"""Settings of the commands: flags > environment NPU_* > TOML file (--config) > defaults."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    CliApp,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from npu_wire.errors import InvalidInput


class _Settings(BaseSettings):
    """How a command's settings are found, and what all commands share."""

    model_config = SettingsConfigDict(
        env_prefix="NPU_",
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )

    config: Path | None = Field(None, description="TOML file with any of these settings")
    debug: bool = Field(False, description="show the traceback of an error")

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


class _TrainingSettings(_Settings):
    """Budget and machine."""

    fp32_steps: int | None = Field(None, ge=0, description="FP32 steps; 0 keeps the model's own weights")
    fp32_lr: float | None = Field(None, gt=0, description="peak learning rate of the FP32 training")
    qat_steps: int = Field(150, ge=1, description="fine-tuning steps of every QAT method")
    qat_lr: float = Field(1e-3, gt=0, description="learning rate of every QAT method")
    qat_batch_size: int = Field(32, ge=1, description="images a fine-tuning step")
    calibration_images: int = Field(1024, ge=1, description="training images that ranges are measured on")
    threads: int = Field(0, ge=0, description="torch's threads; 0: the cores that an embedded server leaves")
    trace: Path | None = Field(None, description="write a Chrome trace of the (first) training on the NPU")


class _ProblemSettings(_TrainingSettings):
    """Model, data and NPU."""

    model: str = Field(
        "mobilenet-v1-small", description="mobilenet-v1-small, mobilenet-v2-small or package.module:factory"
    )
    dataset: str = Field("digits", description="digits, fashion-mnist or package.module:function")
    data_dir: Path | None = Field(None, description="folder of the Fashion-MNIST files")
    endpoint: str | None = Field(
        None, description="NPU server, HOST:PORT or unix:PATH; none: starts an embedded one"
    )
    profile: str | None = Field(None, description="numerics profile of the embedded server")
    backend: str | None = Field(None, description="backend of the embedded server (default emulator)")
    device: str | None = Field(None, description="where the embedded server computes: cpu (default), cuda")
    tls: bool = Field(False, description="encrypt, trusting the system's authorities")
    tls_ca: Path | None = Field(None, description="PEM file of the server's authority; implies TLS")
    tls_cert: Path | None = Field(None, description="PEM file of the client's own certificate")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    token_file: Path | None = Field(None, description="file with the bearer token")
    timeout_s: float = Field(30.0, gt=0, description="how long a server may be silent")
    reconnect_timeout_s: float = Field(60.0, ge=0, description="how long to look for a server that is gone")


T = TypeVar("T", bound=_Settings)


class DemoSettings(_TrainingSettings):
    """Four ways to deploy a small network to two NPUs, on real handwritten digits, in a few minutes."""

    seeds: int = Field(3, ge=1, description="repetitions, with seeds 0, 1, ...")
    out: Path = Field(Path("runs/demo"), description="folder for results; a rerun goes on from it")


class CompareSettings(_ProblemSettings):
    """Compare FP32, min-max PTQ, torchao QAT and NPU in the loop on an NPU."""

    profile: str | None = Field(
        None, description="profiles of embedded servers, separated by commas (default pow2-trunc)"
    )
    seeds: int = Field(3, ge=1, description="repetitions, with seeds 0, 1, ...")
    out: Path = Field(Path("runs/compare"), description="folder for results; a rerun goes on from it")


class TrainSettings(_ProblemSettings):
    """Train one model in FP32, then with the NPU in the loop."""

    seed: int = Field(0, ge=0, description="of initial weights, order of images and augmentation")
    out: Path = Field(
        Path("runs/train"), description="folder for weights.safetensors and checkpoints; a rerun resumes"
    )


def load_settings(settings: type[T], arguments: Sequence[str], program: str) -> T:
    """Settings of a command.

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
    named: Any = type(settings.__name__, (settings,), {"__doc__": settings.__doc__, "__module__": __name__})
    named.model_config = {**settings.model_config, "toml_file": path, "cli_prog_name": program}
    found: T = CliApp.run(named, cli_args=list(arguments))
    return found
