"""A loss inside the model: what it compares with is the user's own numbers, never INT8 codes of them."""

from collections.abc import Callable

import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor, nn
from torch.nn import functional as F

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from trainer_client import prepare


class WithLoss(nn.Module):
    """A network that returns its loss, and what it predicts."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        predicted = self.layers(x)
        return self.loss(predicted, y), predicted


def one_hot(predicted: Tensor, y: Tensor) -> Tensor:
    """Squared distance from one number for each class."""
    return (predicted - F.one_hot(y, 3).float()).square().sum(1).mean()


NUMBERS, CLASSES = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "absolute": (lambda p, y: (p - y).abs().mean(), NUMBERS),
    "relative": (lambda p, y: ((p - y) / (y.abs() + 1)).square().mean(1).mean(), NUMBERS),
    "squared, weighted": (lambda p, y: ((p - y * 2).square() * y.sigmoid()).mean(), NUMBERS),
    "torch's own": (lambda p, y: F.smooth_l1_loss(p, y), NUMBERS),
    "classes": (one_hot, CLASSES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_labels_are_taken_as_they_are(name: str) -> None:
    """PyTorch's loss of the NPU's prediction and labels far beyond what calibration saw, and its gradient."""
    loss, labels = LOSSES[name]
    torch.manual_seed(0)
    model, x = WithLoss(loss), torch.randn(5, 6)
    qat = prepare(model, (x, labels), InProcessNpu(ReferenceBackend(BackendOptions(profile="tflm"))))
    qat.calibrate([(x, labels)])
    assert [spec.name for spec in qat.layer_map.inputs] == ["x"]
    far = labels * 50.3 if labels.is_floating_point() else labels.flip(0)
    got, predicted = qat.train()(x, far)
    expected = loss(predicted, far)
    torch.testing.assert_close(got, expected)
    parameters = list(model.layers[2].parameters())
    for one, other in zip(
        torch.autograd.grad(got, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert torch.equal(qat.eval()(x, far)[0], got)


class Scaled(nn.Module):
    """A second input that is part of the network: it scales features in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.leave(self.enter(x) * y) * y[:, :3]).abs().mean()


class Reconstructed(nn.Module):
    """An autoencoder's loss: its label is the input that the network computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) - x).abs().mean()


@pytest.mark.parametrize(
    ("model", "shapes", "last"), [(Scaled(), [(5, 6), (5, 8)], "abs_1"), (Reconstructed(), [(5, 6)], "abs_1")]
)
def test_what_the_network_computes_with_is_no_label(
    model: nn.Module, shapes: list[tuple[int, int]], last: str
) -> None:
    """Every input that reaches a layer with weights is the NPU's, and so is what follows from it."""
    x = tuple(torch.randn(shape) for shape in shapes)
    qat = prepare(model, x, InProcessNpu(ReferenceBackend(BackendOptions(profile="tflm")))).calibrate([x])
    assert [spec.name for spec in qat.layer_map.inputs] == ["x", "y"][: len(shapes)]
    assert qat.layer_map.outputs == (last,)
