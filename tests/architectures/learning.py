"""A vision transformer that learns handwritten digits with the NPU in the loop."""

from dataclasses import dataclass

import torch

import trainer_client
from trainer_client.commands.data import digits
from trainer_client.commands.trainer import Recipe, accuracy, batches, fit

from .catalogue import Logits

FP32_RECIPE = Recipe(600, 64, 3e-3, "adam-cosine")
FINETUNE_RECIPE = Recipe(60, 32, 3e-4, "adam-cosine")
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Outcome:
    """Accuracy in percent of 700 test images.

    Attributes:
        fp32: of the float network.
        before: of its weights on the NPU.
        after: on the NPU, after `FINETUNE_RECIPE` in the loop.
        losses: of each step in the loop.
        injected: layers whose tensors were injected in each step.
        not_injected: layers with noise that the training graph has no value for.
    """

    fp32: float
    before: float
    after: float
    losses: tuple[float, ...]
    injected: int
    not_injected: int


def small_vit() -> torch.nn.Module:
    """A ViT of 3 blocks over 16 patches of 4 x 4 pixels."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=3,
        num_hidden_layers=3,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        initializer_range=0.1,
    )
    return Logits(transformers.ViTForImageClassification(config))


def learn(profile: str, seed: int = 0) -> Outcome:
    """Trains in FP32, deploys, trains on against an emulator behind a real server."""
    data = digits()
    torch.manual_seed(seed)
    model = small_vit().train()
    fit(model, data, FP32_RECIPE, seed)
    fp32 = accuracy(model, data.test_x, data.test_y)
    with trainer_client.connect(profile=profile) as npu:
        qat = trainer_client.prepare(model, data.train_x[:2], npu)
        qat.calibrate(batches(data.calibration_set(CALIBRATION_IMAGES), 64))
        before = accuracy(qat, data.test_x, data.test_y)
        losses = fit(qat.train(), data, FINETUNE_RECIPE, seed)
        injected, not_injected = qat.noise.fresh, qat.noise.without_noise
        after = accuracy(qat, data.test_x, data.test_y)
    return Outcome(fp32, before, after, tuple(losses), injected, not_injected)
