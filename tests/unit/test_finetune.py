"""`npu-trainer train`, without the command around it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor, nn

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.errors import InvalidInput
from trainer_client.commands.data import Dataset, digits
from trainer_client.commands.finetune import train
from trainer_client.commands.trainer import Recipe
from trainer_client.qat.module import prepare


def tiny() -> nn.Module:
    """A model of a user's own."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *head)


def few_digits() -> Dataset:
    """64 images to train on, 8 to test on."""
    whole = digits()
    few = {"train_x": whole.train_x[:64], "train_y": whole.train_y[:64]}
    return dataclasses.replace(whole, **few, test_x=whole.test_x[:8], test_y=whole.test_y[:8])


def reference() -> InProcessNpu:
    """An NPU in this process."""
    torch.set_num_threads(1)
    return InProcessNpu(ReferenceBackend(BackendOptions(profile="tflm")))


class Rows(nn.Module):
    """Reads an image row by row, with an LSTM, which no NPU of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm, self.out = nn.LSTM(16, 4, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.lstm(x.flatten(1, 2))[0][:, -1]))


def test_what_the_host_computes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the outcome of a training and by `print(qat)`: which layers, their share of the work, and why."""
    data, npu = few_digits(), reference()
    recipe = Recipe(1, 8, 1e-3, "adam-cosine")
    settings = (f"{__name__}:Rows", data, npu, recipe, recipe, 0, 64, tmp_path)
    host = train(*settings, lambda what, steps: lambda step, loss: None).host
    assert [layer.op for layer in host.layers] == ["LSTM", "LayerNormalization"]
    lstm = 16 * 4 * 4 * (16 + 4)
    assert (host.macs, host.of_macs, host.of_layers) == (lstm, lstm + 4 * 10, 5)
    document = json.loads(json.dumps(dataclasses.asdict(host)))
    assert document["note"] == "host float: bits are the runtime's, not the chip's"

    qat = prepare(Rows(), data.train_x[:2], npu)
    assert str(qat) == "Rows in the loop with tflm (reference), not compiled yet: call calibrate(loader)"
    print(qat.calibrate(data.train_x[:8]))
    title, on_npu, on_host, *reasons = capsys.readouterr().out.splitlines()
    assert title == "Rows in the loop with tflm (reference): 5 layers, 5,160 multiply-accumulates a sample"
    assert on_npu == "NPU: 1 Reshape, 1 Gather, 1 Gemm"
    assert on_host.startswith("2 of 5 layers, 99.2% of multiply-accumulates and ")
    assert on_host.endswith("host float: bits are the runtime's, not the chip's")
    assert reasons[0].startswith("  1 LSTM: node 'node_lstm")
    assert reasons[0].endswith("(LSTM): the NPU has no such operator")
    assert reasons[1].endswith("leaves to the host's float unit")


def test_a_rerun_with_other_calibration_images_is_another_run(tmp_path: Path) -> None:
    """The old checkpoint would bring its ranges; of more images than there are, all 64 count."""
    data = few_digits()
    recipe = Recipe(1, 8, 1e-3, "adam-cosine")

    def run(images: int) -> None:
        settings = (f"{__name__}:tiny", data, reference(), recipe, recipe, 0, images, tmp_path)
        train(*settings, lambda what, steps: lambda step, loss: None)

    run(1000)
    with pytest.raises(InvalidInput, match=r"npu\.pt was written by another run .*calibration_images=64"):
        run(8)
