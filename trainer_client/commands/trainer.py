"""A small training loop: all randomness follows from (seed, step), so a resumed run repeats its losses."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from npu_wire.errors import InvalidInput, NonFiniteInput
from trainer_client.commands.data import Dataset

OnStep = Callable[[int, float], None]
"""Called after each step with the number of steps done and the step's loss."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: images a step.
        lr: peak learning rate.
        kind: "sgd-onecycle" (Nesterov momentum .9, warm-up 15 %) or "adam-cosine" (cosine to 0, no warm-up).
        weight_decay: L2 penalty.
    """

    steps: int
    batch_size: int
    lr: float
    kind: Literal["sgd-onecycle", "adam-cosine"]
    weight_decay: float = 0.0


FP32_RECIPES = {
    "digits": Recipe(680, 64, 0.05, "sgd-onecycle", 4e-5),
    "fashion-mnist": Recipe(2400, 128, 0.1, "sgd-onecycle", 4e-5),
}
"""FP32 training per data set; a user's own data set starts from that of digits."""

FINETUNE_RECIPE = Recipe(150, 32, 1e-3, "adam-cosine")
"""The budget that every quantization-aware method gets."""


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    belongs_to: str = "",
    on_step: OnStep | None = None,
) -> list[float]:
    """Trains `model` in place, from the checkpoint if there is one, and returns the loss of every step.

    Args:
        model: a network or a `QatModule`; it stays in the mode (train or eval) that the caller chose.
        data: batches come from its training half only.
        recipe: steps, optimizer and schedule.
        seed: order of the images and their augmentation.
        checkpoint: file to resume from and to write every `checkpoint_every` steps and at the end.
        checkpoint_every: steps between two checkpoints.
        belongs_to: what else a checkpoint must not be mixed with: the model, the NPU.
        on_step: progress.

    Raises:
        NonFiniteInput: the loss became NaN or infinite.
        InvalidInput: the checkpoint is another recipe's, seed's, data set's or owner's.
    """
    optimizer, scheduler = _optimizer(model, recipe)
    identity = f"{recipe} seed={seed} data={data.name} {belongs_to}".strip()
    losses = _resume(checkpoint, identity, model, optimizer, scheduler)
    for step in range(len(losses), recipe.steps):
        x, y = batch(data, recipe.batch_size, seed, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if not torch.isfinite(loss):
            raise NonFiniteInput(f"the loss became {loss.item()} at step {step}; lower the learning rate")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        done = step + 1
        if checkpoint and (done % checkpoint_every == 0 or done == recipe.steps):
            state = {
                "identity": identity,
                "losses": losses,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "torch_rng": torch.get_rng_state(),  # dropout draws from it
            }
            save_atomically(state, checkpoint)
        if on_step:
            on_step(done, losses[-1])
    return losses


def batch(data: Dataset, batch_size: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The augmented batch of a step, a function of (seed, step) alone: images (n, c, h, w), labels (n,)."""
    batch_size = min(batch_size, len(data.train_y))
    per_epoch = len(data.train_y) // batch_size
    epoch, index = divmod(step, per_epoch)
    order = torch.randperm(len(data.train_y), generator=_generator(seed, epoch, stream=0))
    chosen = order[index * batch_size : (index + 1) * batch_size]
    return augment(data.train_x[chosen], data, _generator(seed, step, stream=1)), data.train_y[chosen]


def augment(x: torch.Tensor, data: Dataset, generator: torch.Generator) -> torch.Tensor:
    """Mirrors images and rolls the batch by a few pixels, as far as the data set allows it."""
    if data.flip:
        mirror = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirror[:, None, None, None], x.flip(3), x)
    if data.shift:
        dy, dx = torch.randint(-data.shift, data.shift + 1, (2,), generator=generator).tolist()
        x = torch.roll(x, (dy, dx), (2, 3))
    return x


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch_size: int = 250) -> float:
    """Percentage of samples whose largest logit is the label's, with the model in eval mode."""
    model.eval()
    correct = 0
    for images, labels in zip(batches(x, batch_size), batches(y, batch_size), strict=True):
        correct += int((model(images).argmax(1) == labels).sum())
    return 100 * correct / len(y)


def batches(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    """`x` in parts of at most `size` samples, in order."""
    return [x[start : start + size] for start in range(0, len(x), size)]


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a torch file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _generator(seed: int, counter: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 2 + stream) * 1_000_003 + counter)


def _optimizer(
    model: nn.Module, recipe: Recipe
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.kind == "adam-cosine":
        adam = torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay)
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, _Cosine(recipe.steps))
    sgd = torch.optim.SGD(
        parameters, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    return sgd, torch.optim.lr_scheduler.OneCycleLR(sgd, recipe.lr, total_steps=recipe.steps, pct_start=0.15)


@dataclass(frozen=True)
class _Cosine:
    """Factor on the learning rate: from 1 to 0 along half a cosine."""

    steps: int

    def __call__(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))


def _resume(
    checkpoint: Path | None,
    identity: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> list[float]:
    if checkpoint is None or not checkpoint.exists():
        return []
    state = torch.load(checkpoint, weights_only=True)
    if state["identity"] != identity:
        raise InvalidInput(
            f"{checkpoint} was written by another run ({state['identity']}); this one is {identity}. "
            "Remove the file or choose another --out."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["torch_rng"])
    return list(state["losses"])
