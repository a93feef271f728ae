"""The numbers of a comparison: one file a cell, written when it is done, so that a stopped run can go on."""

import dataclasses
import hashlib
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import InvalidInput
from npu_wire.extras import DISTRIBUTION, own_version
from npu_wire.host_share import HostShare, host_share_from

FP32, PTQ, TORCHAO, NPU = "fp32", "ptq", "torchao", "npu"
METHODS = {
    FP32: "FP32 (no quantization)",
    PTQ: "min-max PTQ",
    TORCHAO: "torchao QAT",
    NPU: "NPU in the loop",
}
"""Method -> what tables call it, in the order of tables."""

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Cell:
    """One measured number.

    Attributes:
        method: a key of `METHODS`.
        seed: of the FP32 training, the order of images and the augmentation.
        accuracy: percent of the test set; on the NPU, but for FP32.
        seconds: wall-clock time; a training that several cells share counts in the first of them.
        profile: name of the NPU's numerics profile; empty for FP32.
        profile_hash: its hash; empty for FP32.
        simulated_accuracy: what torchao's own INT8 simulation claims, in percent; torchao only.
        ranges_from_method: NPU tensors whose range the method itself supplied; the others are calibrated.
        sqnr_db: layer -> signal to quantization noise ratio on calibration images; None: not finite.
        host: how much of the network the NPU's host computed; None for FP32.
    """

    method: str
    seed: int
    accuracy: float
    seconds: float
    profile: str = ""
    profile_hash: str = ""
    simulated_accuracy: float | None = None
    ranges_from_method: int = 0
    sqnr_db: Mapping[str, float | None] = field(default_factory=dict)
    host: HostShare | None = None


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation over seeds (0 for a single seed), in percent."""

    mean: float
    std: float
    seeds: int


@dataclass(frozen=True)
class Results:
    """All that `results.json` holds.

    Attributes:
        setup: model, data, recipes, threads, versions: all that the numbers depend on but the NPUs.
        npus: identity of each NPU.
        cells: what has been measured so far.
        command: how to run it again.
    """

    setup: Mapping[str, Any]
    npus: tuple[Capabilities, ...]
    cells: tuple[Cell, ...]
    command: str = ""

    def accuracies(self, method: str, profile: str) -> dict[int, float]:
        """Seed -> accuracy of a method on an NPU; FP32 is the same for all NPUs."""
        on = "" if method == FP32 else profile
        return {
            cell.seed: cell.accuracy for cell in self.cells if (cell.method, cell.profile) == (method, on)
        }

    def summary(self, method: str, profile: str) -> Summary | None:
        """Mean and deviation of a method on an NPU, or None before the first cell."""
        return summarize(list(self.accuracies(method, profile).values()))

    def best_quantized(self, profile: str) -> str | None:
        """The quantized method with the highest mean accuracy on an NPU."""
        means = {m: s.mean for m in (PTQ, TORCHAO, NPU) if (s := self.summary(m, profile)) is not None}
        return max(means, key=lambda method: means[method]) if means else None

    def cell(self, method: str, profile: str, seed: int) -> Cell | None:
        """One cell, if it has been measured."""
        wanted = (method, profile, seed)
        return next((c for c in self.cells if (c.method, c.profile, c.seed) == wanted), None)

    def host_share(self, profile: str) -> HostShare | None:
        """What an NPU's host computes of the network; None before the first cell."""
        return next((cell.host for cell in self.cells if cell.profile == profile and cell.host), None)

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "format": 1,
            "command": self.command,
            "setup": self.setup,
            "npus": [dataclasses.asdict(npu) for npu in self.npus],
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }

    def save(self, directory: Path) -> Path:
        """Writes `results.json` atomically."""
        path = directory / RESULTS_FILE
        write_json_atomically(self.document(), path)
        return path


def load_results(directory: Path) -> Results:
    """Reads `results.json`.

    Raises:
        InvalidInput: there is none, or it is not one of ours.
    """
    path = directory / RESULTS_FILE
    try:
        document = json.loads(path.read_text())
        npus = tuple(_capabilities(npu) for npu in document["npus"])
        cells = tuple(_cell(cell) for cell in document["cells"])
        return Results(document["setup"], npus, cells, document["command"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"cannot read {path}: {error!r}; give the folder that `npu-trainer compare --out` wrote"
        ) from error


def _cell(document: Mapping[str, Any]) -> Cell:
    host = document.get("host")
    return Cell(**{**document, "host": None if host is None else host_share_from(host)})


def _capabilities(document: Mapping[str, Any]) -> Capabilities:
    lists = {name: tuple(document[name]) for name in ("operators", "failed_kernels")}
    return Capabilities(**{**document, **lists, "fingerprint": Fingerprint(**document["fingerprint"])})


class CellStore:
    """A folder with one JSON file a cell, named by all that the cell depends on."""

    def __init__(self, directory: Path, setup: Mapping[str, Any]) -> None:
        self._directory = directory / "cells"
        self._setup = setup

    def key(self, method: str, seed: int, npu: Capabilities | None = None) -> str:
        """Hash of the setup, method, seed and NPU: equal keys, equal numbers."""
        mark = npu.fingerprint if npu else None
        device = [mark.backend, mark.firmware, mark.profile, mark.profile_hash] if mark else []
        return digest({"setup": self._setup, "method": method, "seed": seed, "npu": device})

    def load(self, method: str, seed: int, npu: Capabilities | None) -> Cell | None:
        """The finished cell, or None."""
        path = self._path(method, seed, npu)
        return _cell(json.loads(path.read_text())) if path.exists() else None

    def save(self, cell: Cell, npu: Capabilities | None) -> None:
        """Writes a cell, whole or not at all."""
        write_json_atomically(dataclasses.asdict(cell), self._path(cell.method, cell.seed, npu))

    def _path(self, method: str, seed: int, npu: Capabilities | None) -> Path:
        return self._directory / f"{method}-seed{seed}-{self.key(method, seed, npu)}.json"


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean and sample standard deviation; None without values."""
    if not values:
        return None
    return Summary(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values)
    )


def digest(document: Any) -> str:
    """First 16 hex digits of the SHA-256 of canonical JSON."""
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """What the numbers may depend on besides the code that is compared."""
    packages = ("torch", "torchao", "numpy", "onnx", "onnxscript")
    own = {"python": platform.python_version(), DISTRIBUTION: own_version()}
    return own | {name: metadata.version(name) for name in packages}


def write_json_atomically(document: Any, path: Path) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
