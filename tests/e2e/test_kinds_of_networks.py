"""Networks that are no image classifier train in the loop, through a real server process.

Each overfits one batch for some steps; then the NPU's evaluation is, bit for bit, what training saw.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from breadth.own import Detector, Recurrent, TwoInputs
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import trainer_client
from trainer_client.npu.connection import Connection

pytestmark = pytest.mark.slow

STEPS = 15
SAMPLES = 16


@pytest.fixture(scope="module")
def npu() -> Iterator[Connection]:
    """An embedded emulator in a process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the machine's other core is the server's
    with trainer_client.connect(profile="tflm") as connection:
        yield connection
    torch.set_num_threads(threads)


def assert_learns(
    npu: Connection, model: nn.Module, batch: Mapping[str, Tensor], loss_of: Callable[[Any], Tensor]
) -> None:
    """The loss falls, all gradients are finite, and evaluation equals the training forward."""
    qat = trainer_client.prepare(model, dict(batch), npu).calibrate([batch])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(qat.train()(**batch))
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], losses

    trained = [leaf.detach() for leaf in pytree.tree_leaves(qat(**batch)) if isinstance(leaf, Tensor)]
    with torch.no_grad():
        evaluated = [leaf for leaf in pytree.tree_leaves(qat.eval()(**batch)) if isinstance(leaf, Tensor)]
    assert len(trained) == len(evaluated) > 0
    for expected, actual in zip(trained, evaluated, strict=True):
        assert torch.equal(expected, actual)
    qat.close()


def test_a_detector_with_three_outputs_and_its_own_loss(npu: Connection) -> None:
    """Boxes, objectness and classes at three strides; bright squares in noise, one in each image."""
    torch.manual_seed(0)
    images, corners = 0.3 * torch.randn(SAMPLES, 3, 32, 32), torch.randint(0, 22, (SAMPLES, 2))
    classes = torch.randint(0, 3, (SAMPLES,))
    for image, (x, y), kind in zip(images, corners.tolist(), classes.tolist(), strict=True):
        image[kind, y : y + 10, x : x + 10] += 2
    boxes = torch.cat([corners / 32 + 5 / 32, torch.full((SAMPLES, 2), 10 / 32)], 1)

    def loss_of(outputs: list[Tensor]) -> Tensor:
        total = torch.zeros(())
        for output in outputs:
            cells = output.shape[-1]
            column, row = (boxes[:, :2] * cells).long().unbind(1)
            wanted = torch.zeros(SAMPLES, cells, cells)
            found = output[torch.arange(SAMPLES), :, row, column]
            wanted[torch.arange(SAMPLES), row, column] = 1
            total = total + functional.binary_cross_entropy_with_logits(output[:, 4], wanted)
            total = total + functional.smooth_l1_loss(found[:, :4].sigmoid(), boxes)
            total = total + functional.cross_entropy(found[:, 5:], classes)
        return total

    assert_learns(npu, Detector(), {"image": images}, loss_of)


def test_two_inputs_and_a_dict_of_outputs(npu: Connection) -> None:
    """A picture and numbers about it; the class depends on both."""
    torch.manual_seed(0)
    table, bright = torch.randn(SAMPLES, 5), torch.randint(0, 2, (SAMPLES,))
    image = 0.3 * torch.randn(SAMPLES, 3, 16, 16) + bright[:, None, None, None]
    classes = bright + (table[:, 0] > 0).long()
    assert_learns(
        npu,
        TwoInputs(),
        {"image": image, "table": table},
        lambda output: functional.cross_entropy(output["scores"], classes),
    )


def test_a_bidirectional_lstm(npu: Connection) -> None:
    """Series that rise, fall or stay."""
    torch.manual_seed(0)
    classes = torch.randint(0, 3, (SAMPLES,))
    slope = (classes - 1)[:, None, None] * torch.linspace(-1, 1, 6)[None, :, None]
    series = 0.2 * torch.randn(SAMPLES, 6, 8) + slope
    model = Recurrent(nn.LSTM, bidirectional=True)
    assert_learns(npu, model, {"x": series}, lambda scores: functional.cross_entropy(scores, classes))


def test_a_bert_that_computes_its_own_loss(npu: Connection) -> None:
    """Hugging Face's BERT with token ids, attention mask and labels: `qat(**batch).loss` falls."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        num_labels=2,
        initializer_range=0.2,  # alive from the start, where a pretrained one would be
    )
    ids, labels = torch.randint(5, 40, (SAMPLES, 12)), torch.randint(0, 2, (SAMPLES,))
    ids[:, 3] = torch.where(labels == 1, 1, 2)
    mask = torch.ones_like(ids)
    mask[: SAMPLES // 2, -4:] = 0
    assert_learns(
        npu,
        transformers.BertForSequenceClassification(config),
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
        lambda output: output.loss,
    )
