"""`npu-trainer train`, without the command around it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from in_process_npu import InProcessNpu
from torch import nn

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import InvalidInput
from trainer_client.commands.data import digits
from trainer_client.commands.finetune import train
from trainer_client.commands.trainer import Recipe


def tiny() -> nn.Module:
    """A model of a user's own."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *head)


def test_a_rerun_with_other_calibration_images_is_another_run(tmp_path: Path) -> None:
    """The old checkpoint would bring its ranges; of more images than there are, all 64 count."""
    torch.set_num_threads(1)
    backend = ReferenceBackend(BackendOptions(profile="tflm"))
    backend.open()
    whole = digits()
    few = {"train_x": whole.train_x[:64], "train_y": whole.train_y[:64]}
    data = dataclasses.replace(whole, **few, test_x=whole.test_x[:8], test_y=whole.test_y[:8])
    recipe = Recipe(1, 8, 1e-3, "adam-cosine")

    def run(images: int) -> None:
        settings = (f"{__name__}:tiny", data, InProcessNpu(backend), recipe, recipe, 0, images, tmp_path)
        train(*settings, lambda what, steps: lambda step, loss: None)

    run(1000)
    with pytest.raises(InvalidInput, match=r"npu\.pt was written by another run .*calibration_images=64"):
        run(8)
