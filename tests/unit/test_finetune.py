"""`npu-trainer train`, without the command around it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from in_process_npu import InProcessNpu

from npu_server.backends.base import BackendOptions
from npu_server.backends.emulator import EmulatorBackend
from npu_wire.errors import InvalidInput
from trainer_client.data import digits
from trainer_client.finetune import train
from trainer_client.trainer import Recipe


def test_a_rerun_with_other_calibration_images_is_another_run(tmp_path: Path) -> None:
    """The old checkpoint would bring its ranges; more images than there are is the same as all of them."""
    torch.set_num_threads(1)
    backend = EmulatorBackend(BackendOptions(profile="tflm"))
    backend.open()
    whole = digits()
    few = {"train_x": whole.train_x[:64], "train_y": whole.train_y[:64]}
    data = dataclasses.replace(whole, **few, test_x=whole.test_x[:8], test_y=whole.test_y[:8])
    recipe = Recipe(1, 8, 1e-3, "adam-cosine")

    def run(images: int) -> str:
        settings = ("mobilenet-v1-small", data, InProcessNpu(backend), recipe, recipe, 0, images, tmp_path)
        return train(*settings, lambda what, steps: lambda step, loss: None).sha256

    first = run(64)
    assert run(1000) == first
    with pytest.raises(InvalidInput, match=r"npu\.pt was written by another run .*calibration_images=64"):
        run(8)
