"""The four-way comparison: FP32, min-max PTQ, torchao QAT and NPU in the loop; same nets, seeds and budget.

Every INT8 number is the NPU's own: the network is deployed through the service and runs the full test set
there. Nothing is selected on the test set. What is finished is kept on disk: a run can be stopped anywhere.
"""

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from npu_wire.device import Capabilities
from npu_wire.errors import InvalidInput
from trainer_client.commands.baselines import TorchaoResult, join_ranges, train_torchao
from trainer_client.commands.data import Dataset
from trainer_client.commands.nets import build_model
from trainer_client.commands.results import (
    FP32,
    METHODS,
    NPU,
    TORCHAO,
    Cell,
    CellStore,
    Results,
    digest,
    versions,
)
from trainer_client.commands.trainer import OnStep, Recipe, accuracy, batches, fit, save_atomically
from trainer_client.npu.session import Npu
from trainer_client.qat.calibrate import Range, observe
from trainer_client.qat.capture import capture
from trainer_client.qat.module import Fp32Pass, QatModule
from trainer_client.qat.trace import Trace

_CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
        model: a name or `package.module:factory` for `build_model`.
        seeds: number of seeds, from 0.
        fp32: recipe of the FP32 training that all methods start from; 0 steps keep the factory's own weights.
        finetune: the budget of either quantization-aware method.
        calibration_images: training images that PTQ, and all else that needs ranges, is calibrated with.
        threads: torch's threads; float32 sums depend on their number, so it is part of the run's identity.
        fp32_pass: of the training with the NPU; see `trainer_client.qat.module.prepare`.
    """

    model: str
    seeds: int
    fp32: Recipe
    finetune: Recipe
    calibration_images: int
    threads: int
    fp32_pass: Fp32Pass = "always"


class Watcher(Protocol):
    """Who is told how the comparison goes on."""

    def begin(self, what: str, steps: int) -> OnStep:
        """A training begins; the returned function is called after each step."""
        ...

    def finished(self, cell: Cell) -> None:
        """A cell is there, just measured or found on disk."""
        ...


def compare(
    plan: Plan,
    data: Dataset,
    npus: Sequence[Npu],
    out: Path,
    watcher: Watcher,
    command: str,
    trace: Trace | None,
) -> Results:
    """Measures every cell that `out` does not hold yet, and writes `results.json` after each.

    Args:
        plan: what to compare.
        data: the images.
        npus: one column each.
        out: folder of cells, networks and results.
        watcher: progress.
        command: how to run it again, for the report.
        trace: collects the first NPU-in-the-loop training.

    Raises:
        InvalidInput: two NPUs with one profile name.
        NpuError: see `trainer_client.qat.module.prepare`; what was finished before stays on disk.
    """
    profiles = [npu.info.profile for npu in npus]
    if len(set(profiles)) < len(profiles):
        raise InvalidInput(f"two NPUs have the same profile: {', '.join(profiles)}; compare different ones")
    lab = _Laboratory(plan, data, out, watcher)
    results = Results(lab.setup, tuple(npu.info for npu in npus), (), command)
    for seed in range(plan.seeds):
        for method in METHODS:
            for npu in [None] if method == FP32 else npus:
                traced = trace if (method, seed) == (NPU, 0) and npu is npus[0] else None
                cell = lab.cell(method, seed, npu, traced)
                results = dataclasses.replace(results, cells=(*results.cells, cell))
                results.save(out)
                watcher.finished(cell)
    return results


class _Laboratory:
    """Trains, deploys and measures one cell at a time; cells share the networks that they start from."""

    def __init__(self, plan: Plan, data: Dataset, out: Path, watcher: Watcher) -> None:
        self._plan = plan
        self._data = data
        self._watcher = watcher
        self._networks = out / "networks"
        model = build_model(plan.model, data.classes, data.channels)
        self.setup = _setup(plan, data, model)
        self._store = CellStore(out, self.setup)
        self._calibration = batches(data.calibration_set(plan.calibration_images), _CALIBRATION_BATCH)

    def cell(self, method: str, seed: int, npu: Npu | None, trace: Trace | None) -> Cell:
        """The number of a method on an NPU (None: FP32), from disk if it is there."""
        device = npu.info if npu else None
        known = self._store.load(method, seed, device)
        if known:
            return known
        start = time.monotonic()
        if npu is None or device is None:
            self._captured.model.load_state_dict(self._fp32(seed))
            model = self._captured.model
            cell = Cell(method, seed, accuracy(model, self._data.test_x, self._data.test_y), 0.0)
        else:
            cell = self._measure(method, seed, npu, device, trace)
        cell = dataclasses.replace(cell, seconds=round(time.monotonic() - start, 2))
        self._store.save(cell, device)
        return cell

    def _measure(self, method: str, seed: int, npu: Npu, device: Capabilities, trace: Trace | None) -> Cell:
        cell = Cell(method, seed, 0.0, 0.0, device.profile, device.profile_hash)
        if method == TORCHAO:
            learned = self._torchao(seed)
            self._captured.model.load_state_dict(learned.state)
            ranges = observe(self._captured, self._calibration)
            learned_ranges = self._learned_ranges(npu, learned, ranges)
            ranges |= learned_ranges
            cell = dataclasses.replace(
                cell,
                simulated_accuracy=learned.simulated_accuracy,
                ranges_from_method=len(learned_ranges),
            )
        else:
            self._captured.model.load_state_dict(self._fp32(seed))
            ranges = observe(self._captured, self._calibration)
        qat = QatModule(self._captured, npu, trace=trace, ranges=ranges, fp32_pass=self._plan.fp32_pass)
        try:
            if method == NPU:
                name = f"{METHODS[NPU]}, {device.profile}, seed {seed}"
                on_step = self._watcher.begin(name, self._plan.finetune.steps)
                path = self._networks / f"npu-seed{seed}-{self._store.key(NPU, seed, device)}.pt"
                qat.train()
                fit(qat, self._data, self._plan.finetune, seed, path, on_step=on_step)
            sqnr_db = self._sqnr_db(qat, device.max_batch)
            value = accuracy(qat, self._data.test_x, self._data.test_y)
            host = qat.host_share
        finally:
            qat.close()
        return dataclasses.replace(cell, accuracy=value, sqnr_db=sqnr_db, host=host)

    @functools.cached_property
    def _captured(self) -> Any:
        """The one capture; `load_state_dict` of its model puts any network in its place."""
        model = build_model(self._plan.model, self._data.classes, self._data.channels)
        return capture(model, self._data.train_x[:2])

    def _learned_ranges(
        self, npu: Npu, learned: TorchaoResult, observed: Mapping[str, Range]
    ) -> dict[str, Range]:
        """The ranges that torchao has learned, by NPU tensor; calibrated ones serve to get the layer map."""
        probe = QatModule(self._captured, npu, ranges=observed)
        try:
            return join_ranges(learned, probe.layer_map)
        finally:
            probe.close()

    @torch.no_grad()
    def _sqnr_db(self, qat: QatModule, max_batch: int) -> dict[str, float | None]:
        """Signal to quantization noise ratio of each layer (by ONNX value name), on calibration images."""
        qat.train()
        qat.reset_noise()
        for images in self._calibration[:4]:
            for part in batches(images, max_batch):
                qat(part)
        layers = qat.total_noise.layers.items()
        return {name: noise.sqnr_db if math.isfinite(noise.sqnr_db) else None for name, noise in layers}

    def _fp32(self, seed: int) -> Mapping[str, Any]:
        """The FP32 network of a seed; its checkpoint makes a second call cheap."""
        torch.manual_seed(seed)
        model = build_model(self._plan.model, self._data.classes, self._data.channels)
        if self._plan.fp32.steps:
            path = self._networks / f"fp32-seed{seed}-{self._store.key(FP32, seed)}.pt"
            on_step = self._watcher.begin(f"FP32, seed {seed}", self._plan.fp32.steps)
            model.train()
            fit(model, self._data, self._plan.fp32, seed, path, on_step=on_step)
        return model.state_dict()

    def _torchao(self, seed: int) -> TorchaoResult:
        """Torchao's network of a seed, trained once for all NPUs: it knows none of them."""
        path = self._networks / f"torchao-seed{seed}-{self._store.key(TORCHAO, seed)}.pt"
        if path.exists():
            return TorchaoResult(**torch.load(path, weights_only=True))
        model = build_model(self._plan.model, self._data.classes, self._data.channels)
        model.load_state_dict(self._fp32(seed))
        on_step = self._watcher.begin(f"{METHODS[TORCHAO]}, seed {seed}", self._plan.finetune.steps)
        learned = train_torchao(model, self._data, self._plan.finetune, seed, on_step)
        save_atomically({f.name: getattr(learned, f.name) for f in dataclasses.fields(learned)}, path)
        return learned


def _setup(plan: Plan, data: Dataset, model: nn.Module) -> dict[str, Any]:
    """All that the numbers depend on, but seed and NPU, as JSON."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    images = hashlib.sha256()
    for part in (data.train_x, data.train_y, data.test_x, data.test_y):
        images.update(part.contiguous().numpy().tobytes())
    return {
        "model": plan.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "architecture": digest(shapes),
        "dataset": data.name,
        "train_images": len(data.train_y),
        "test_images": len(data.test_y),
        "augmentation": {"shift": data.shift, "flip": data.flip},
        "data_sha256": images.hexdigest(),
        "fp32": dataclasses.asdict(plan.fp32),
        "finetune": dataclasses.asdict(plan.finetune),
        "calibration_images": min(plan.calibration_images, len(data.train_y)),
        "threads": plan.threads,
        "fp32_pass": plan.fp32_pass,
        "versions": versions(),
    }
