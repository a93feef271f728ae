"""Settings of the commands; `npu_wire.settings` says where they come from."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from npu_wire.settings import ServerAccess, Settings


class Training(BaseModel):
    """The training."""

    fp32_steps: int | None = Field(None, ge=0, description="FP32 steps; 0 keeps the model's own weights")
    fp32_lr: float | None = Field(None, gt=0, description="peak learning rate of the FP32 training")
    qat_steps: int = Field(150, ge=1, description="fine-tuning steps of every QAT method")
    qat_lr: float = Field(1e-3, gt=0, description="learning rate of every QAT method")
    qat_batch_size: int = Field(32, ge=1, description="images a fine-tuning step")
    fp32_pass: Literal["always", "where_needed"] = Field(
        "always",
        description="FP32 work beside the NPU: of every layer, or only where its registers may overflow",
    )
    calibration_images: int = Field(1024, ge=1, description="training images that ranges are measured on")
    threads: int = Field(0, ge=0, description="torch's threads; 0: the cores that an embedded server leaves")


class Output(BaseModel):
    """What comes out."""

    trace: Path | None = Field(None, description="write a Chrome trace of the (first) training on the NPU")
    json_: bool = Field(False, description="print JSON instead of a table; progress goes to standard error")


class Problem(BaseModel):
    """Model and data."""

    model: str = Field(
        "mobilenet-v1-small",
        title="NAME|MODULE:FACTORY",
        description="mobilenet-v1-small, mobilenet-v2-small or your own, from here or installed",
    )
    dataset: str = Field(
        "digits",
        title="NAME|MODULE:FUNCTION",
        description="digits, fashion-mnist or your own, from here or installed",
    )
    data_dir: Path | None = Field(None, title="FOLDER", description="of the Fashion-MNIST files")


class Npu(ServerAccess):
    """The NPU."""

    endpoint: str | None = Field(
        None, title="ADDRESS", description="server, HOST:PORT or unix:PATH; none: starts an embedded one"
    )
    profile: str | None = Field(
        None, title="NAME|FILE", description="numerics profile of the embedded server; none: its default"
    )
    backend: str | None = Field(None, description="of the embedded server; none: its default")
    device: str | None = Field(None, description="where the embedded server computes: cpu, cuda")
    timeout_s: float = Field(30.0, gt=0, description="how long a server may be silent")
    reconnect_timeout_s: float = Field(60.0, ge=0, description="how long to look for a server that is gone")


class DemoSettings(Training, Output, Settings):
    """Compare four ways to deploy a small network to two NPUs, on handwritten digits, in a few minutes."""

    seeds: int = Field(3, ge=1, description="repetitions, with seeds 0, 1, ...")
    out: Path = Field(Path("runs/demo"), title="FOLDER", description="for results; a rerun goes on from it")


class CompareSettings(Problem, Npu, Training, Output, Settings):
    """Compare FP32, min-max PTQ, torchao QAT and NPU in the loop on your own model, data and NPU."""

    profile: str | None = Field(
        None,
        title="NAMES|FILES",
        description="profiles of embedded servers, separated by commas; none: the server's default",
    )
    seeds: int = Field(3, ge=1, description="repetitions, with seeds 0, 1, ...")
    out: Path = Field(
        Path("runs/compare"), title="FOLDER", description="for results; a rerun goes on from it"
    )


class TrainSettings(Problem, Npu, Training, Output, Settings):
    """Train one model in FP32, then with the NPU in the loop."""

    seed: int = Field(0, ge=0, description="of initial weights, order of images and augmentation")
    out: Path = Field(
        Path("runs/train"),
        title="FOLDER",
        description="for weights.safetensors and checkpoints; a rerun resumes",
    )


class ReportSettings(Settings):
    """Write report.html again from the results in a folder."""

    positional: ClassVar[tuple[str, ...]] = ("folder",)

    folder: Path = Field(title="FOLDER", description="what `npu-trainer compare --out` wrote")
    json_: bool = Field(False, description="print JSON instead of a table")
