"""`npu-trainer train`: one model, FP32 first, then with the NPU in the loop; a rerun resumes."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from npu_wire.host_share import HostShare
from trainer_client.commands.data import Dataset
from trainer_client.commands.nets import build_model
from trainer_client.commands.trainer import OnStep, Recipe, accuracy, batches, fit
from trainer_client.npu.session import Npu
from trainer_client.qat.module import Fp32Pass, prepare
from trainer_client.qat.trace import Trace

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True)
class Outcome:
    """Accuracies in percent of the test set, and the file of the weights.

    Attributes:
        fp32: of the FP32 network, on the CPU.
        before: of the FP32 network's weights on the NPU.
        after: on the NPU, after training in the loop.
        weights: safetensors file; its metadata key "npu" holds profile, hash and ranges as JSON.
        sha256: of that file: equal runs give equal files.
        host: how much of the network the NPU's host computed.
    """

    fp32: float
    before: float
    after: float
    weights: Path
    sha256: str
    host: HostShare


def train(
    model_name: str,
    data: Dataset,
    npu: Npu,
    fp32: Recipe,
    finetune: Recipe,
    seed: int,
    calibration_images: int,
    out: Path,
    begin: Callable[[str, int], OnStep],
    trace: Trace | None = None,
    fp32_pass: Fp32Pass = "always",
) -> Outcome:
    """Trains and deploys; a rerun with the same `out` goes on from the last checkpoint.

    Args:
        model_name: for `build_model`.
        data: the images.
        npu: where to deploy to.
        fp32: recipe of the FP32 training; 0 steps keep the model's own weights.
        finetune: recipe of the training on the NPU.
        seed: of initial weights, order of images and augmentation.
        calibration_images: training images that ranges are measured on.
        out: folder for weights and checkpoints.
        begin: is told of each training, returns what to call after each of its steps.
        trace: collects the training on the NPU.
        fp32_pass: see `trainer_client.qat.module.prepare`.

    Raises:
        NpuError: see `trainer_client.qat.module.prepare` and `trainer_client.commands.trainer.fit`.
    """
    torch.manual_seed(seed)
    model = build_model(model_name, data.classes, data.channels)
    if fp32.steps:
        on_step = begin("FP32", fp32.steps)
        fit(model, data, fp32, seed, out / "fp32.pt", on_step=on_step, belongs_to=f"model={model_name}")
    fp32_accuracy = accuracy(model, data.test_x, data.test_y)
    qat = prepare(model, data.train_x[:2], npu, trace=trace, fp32_pass=fp32_pass)
    try:
        qat.calibrate(batches(data.calibration_set(calibration_images), 64))
        before = accuracy(qat, data.test_x, data.test_y)
        qat.train()
        images = min(calibration_images, len(data.train_y))
        owner = f"model={model_name} npu={npu.info.profile_hash} fp32={fp32} calibration_images={images}"
        owner += f" fp32_pass={fp32_pass}"
        on_step = begin(f"NPU in the loop, {npu.info.profile}", finetune.steps)
        fit(qat, data, finetune, seed, out / "npu.pt", on_step=on_step, belongs_to=owner)
        after = accuracy(qat, data.test_x, data.test_y)
        ranges = {name: list(bounds) for name, bounds in qat.ranges.items()}
        host = qat.host_share
    finally:
        qat.close()
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    deployed = {"profile": npu.info.profile, "profile_hash": npu.info.profile_hash, "ranges": ranges}
    # One key only: safetensors writes several in random order, and equal runs shall give equal files.
    save_file(state, out / WEIGHTS_FILE, {"npu": json.dumps(deployed)})
    digest = hashlib.sha256((out / WEIGHTS_FILE).read_bytes())
    return Outcome(fp32_accuracy, before, after, out / WEIGHTS_FILE, digest.hexdigest(), host)
