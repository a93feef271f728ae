from pathlib import Path

import pytest
import torch
from torch import nn

from npu_wire.errors import InvalidInput, NonFiniteInput
from trainer_client.commands.data import Dataset, digits
from trainer_client.commands.nets import build_model
from trainer_client.commands.trainer import Recipe, accuracy, batch, fit

RECIPE = Recipe(steps=12, batch_size=16, lr=1e-2, kind="adam-cosine")


class InterruptError(Exception):
    """Stands for Ctrl-C in the middle of a run."""


def net() -> nn.Module:
    """A small net with everything that a checkpoint must hold: batch norm statistics and dropout."""
    torch.manual_seed(3)
    conv = [nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*conv, nn.Dropout(0.3), nn.Linear(196, 10))


@pytest.mark.parametrize("kind", ["adam-cosine", "sgd-onecycle"])
def test_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    """Stopped at step 7 with a checkpoint every 5, a run ends with the losses and weights of a whole one."""
    recipe = Recipe(steps=12, batch_size=16, lr=1e-2, kind=kind)  # type: ignore[arg-type]
    data, whole = digits(), net()
    expected = fit(whole, data, recipe, seed=1)

    def stop(step: int, loss: float) -> None:
        if step == 7:
            raise InterruptError

    path = tmp_path / "run.pt"
    with pytest.raises(InterruptError):
        fit(net(), data, recipe, seed=1, checkpoint=path, checkpoint_every=5, on_step=stop)
    torch.manual_seed(99)  # a new process would not be where the old one was
    resumed = net()
    torch.manual_seed(99)
    assert expected == fit(resumed, data, recipe, seed=1, checkpoint=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """A checkpoint does not mix two seeds."""
    path = tmp_path / "run.pt"
    fit(net(), digits(), RECIPE, seed=1, checkpoint=path)
    with pytest.raises(InvalidInput, match="written by another run"):
        fit(net(), digits(), RECIPE, seed=2, checkpoint=path)


def test_an_epoch_sees_each_image_once() -> None:
    """The batches of one epoch partition the training set."""
    x = torch.arange(12.0).reshape(12, 1, 1, 1)
    y = torch.arange(12)
    data = Dataset("count", x, y, x, y)
    seen = torch.cat([batch(data, 4, seed=5, step=step)[1] for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))
    assert batch(data, 4, seed=5, step=3)[1].tolist() != batch(data, 4, seed=5, step=0)[1].tolist()


def test_a_learning_rate_that_diverges_is_reported() -> None:
    """An infinite loss stops the run with the step and the remedy."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(NonFiniteInput, match="lower the learning rate"):
        fit(linear, digits(), Recipe(9, 16, 1e38, "sgd-onecycle"), 0)


def test_accuracy_counts_over_unequal_batches() -> None:
    """Seven samples in batches of three, five of them right."""
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 0, 1])]
    assert accuracy(nn.Identity(), logits, y, batch_size=3) == 100 * 5 / 7


@pytest.mark.parametrize("name", ["mobilenet-v1-small", "mobilenet-v2-small"])
def test_nets_learn_their_own_training_images(name: str) -> None:
    """Sixty steps bring either net well above chance on images it never saw."""
    data = digits()
    torch.manual_seed(0)
    model = build_model(name, data.classes, data.channels)
    fit(model, data, Recipe(60, 64, 0.05, "sgd-onecycle"), seed=0)
    assert accuracy(model, data.test_x, data.test_y) > 60


def test_unknown_net_is_refused() -> None:
    """The error lists what there is."""
    with pytest.raises(InvalidInput, match="mobilenet-v1-small, mobilenet-v2-small"):
        build_model("resnet", 10, 1)
