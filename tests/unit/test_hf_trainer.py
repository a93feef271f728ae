"""Hugging Face's Trainer over a model in the loop: trains, evaluates, saves checkpoints, resumes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from npu_server.backends.emulator import EmulatorBackend
from npu_server.seam import BackendOptions
from trainer_client.qat.module import QatModule, prepare

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
SAMPLES = [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(IMAGES)]


def _in_the_loop(seed: int) -> QatModule:
    torch.manual_seed(seed)
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )
    batch = {"pixel_values": IMAGES[:4], "labels": torch.tensor([0, 1, 2, 0])}
    return prepare(vit, batch, InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm"))))


def _trainer(qat: QatModule, folder: Path) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="epoch",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    return Trainer(qat, arguments, train_dataset=SAMPLES, eval_dataset=SAMPLES)  # type: ignore[arg-type]


def _losses(trainer: Trainer) -> list[Any]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_vit_trains_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Eight steps equal four, a checkpoint loaded into a model that knows no ranges, and four more."""
    qat = _in_the_loop(1).calibrate([{key: torch.stack([s[key] for s in SAMPLES]) for key in SAMPLES[0]}])
    trainer = _trainer(qat, tmp_path)
    trainer.train()
    losses, weights = _losses(trainer), {name: t.clone() for name, t in qat.state_dict().items()}
    assert len(losses) == 8
    assert qat.noise.fresh > 10

    checkpoint = tmp_path / "checkpoint-4"
    assert "model.safetensors" in os.listdir(checkpoint)
    resumed = _trainer(_in_the_loop(9), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert _losses(resumed) == losses
    assert isinstance(resumed.model, QatModule)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    _evaluation_is_the_npus(resumed)


def _evaluation_is_the_npus(trainer: Trainer) -> None:
    """Predictions are those of the training forward of the same weights, bit for bit."""
    predictions = torch.from_numpy(trainer.predict(SAMPLES).predictions)  # type: ignore[arg-type]
    labels: Tensor = torch.stack([sample["labels"] for sample in SAMPLES])
    qat = trainer.model
    assert qat is not None
    trained = qat.train()(pixel_values=IMAGES, labels=labels)
    assert torch.equal(predictions, trained.logits.detach())
    assert not torch.equal(qat.model.eval()(pixel_values=IMAGES).logits, predictions)
