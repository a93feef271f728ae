"""Hugging Face Accelerate around a model in the loop: prepare, train, save the state, resume."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from in_the_loop import new_npu
from safetensors.torch import load_file
from small_nets import images, residual_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainer_client.qat.module import QatModule, prepare

LABELS = torch.arange(24) % 5


class _Run:
    """A model, an optimizer and a loader as `accelerator.prepare` returns them."""

    def __init__(self, seed: int, *, calibrated: bool) -> None:
        self.accelerator = Accelerator(cpu=True)
        net = residual_net(seed=seed)
        qat = prepare(net, images(2), new_npu())
        if calibrated:
            qat.calibrate(images(16))
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            qat,
            torch.optim.Adam(net.parameters(), 1e-2),
            DataLoader(TensorDataset(images(24), LABELS), batch_size=8),
        )

    def epoch(self) -> list[float]:
        """Losses of three steps."""
        self.model.train()
        return [self._step(x, y) for x, y in self.loader]

    def _step(self, x: Tensor, y: Tensor) -> float:
        with self.accelerator.accumulate(self.model):
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


@pytest.mark.parametrize("safe", [True, False])
def test_a_saved_state_resumes_bit_for_bit(tmp_path: Path, safe: bool) -> None:
    """Two epochs equal one, `save_state`, `load_state` into new objects that know no ranges, and one more."""
    first = _Run(1, calibrated=True)
    first.epoch()
    first.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    expected = first.epoch()

    resumed = _Run(9, calibrated=False)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.epoch() == expected
    unwrapped = resumed.accelerator.unwrap_model(resumed.model)
    assert isinstance(unwrapped, QatModule)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, unwrapped.state_dict()[name]), name


def test_a_saved_model_loads_into_the_users_own(tmp_path: Path) -> None:
    """`save_model` of the unwrapped model's `.model` writes the names that the user's class has."""
    run = _Run(1, calibrated=True)
    run.epoch()
    run.accelerator.save_model(run.accelerator.unwrap_model(run.model).model, str(tmp_path))
    fresh = residual_net(seed=4)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = images(3)
    trained = run.accelerator.unwrap_model(run.model).model.eval()
    assert torch.equal(fresh.eval()(x), trained(x))
