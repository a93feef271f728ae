"""Six networks that people run, exported as the trainer exports a user's own; two with trained weights."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tests.architectures.catalogue import CATALOGUE, Architecture, photographs
from trainer_client.commands.data import digits
from trainer_client.commands.nets import MobileNetV1Small
from trainer_client.qat.capture import capture

from . import formulas
from .random_networks import Subject
from .reading import read

_CALIBRATION, _TEST = 0, 1


def _regnet_x() -> nn.Module:
    """Convolutions in groups of 8 channels."""
    import transformers

    config = transformers.RegNetConfig(
        num_labels=10, layer_type="x", hidden_sizes=[24, 56, 152, 368], depths=[1, 1, 4, 7], groups_width=8
    )
    return transformers.RegNetForImageClassification(config)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _digits(n: int, rng: np.random.Generator) -> Tensor:
    images = digits().test_x
    return images[torch.from_numpy(rng.integers(0, len(images), n))]


def _trained_on_digits() -> nn.Module:
    """The demo's network, some hundred steps away from its first weights."""
    data, model = digits(), MobileNetV1Small()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        some = torch.randint(len(data.train_x), (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train_x[some]), data.train_y[some]).backward()
        optimizer.step()
    return model


_SHIPPED = {a.name: a for a in CATALOGUE}
_ARCHITECTURES = (
    _SHIPPED["DS-CNN"],
    Architecture("MobileNetV1-like, trained on digits", "own", _trained_on_digits, _digits, trained=True),
    _SHIPPED["MobileNetV2 0.5"],
    _SHIPPED["ResNet18"],
    Architecture(
        "RegNetX 200MF",
        "transformers RegNetForImageClassification",
        lambda: _Logits(_regnet_x()),
        photographs(64),
    ),
    _SHIPPED["EfficientNet-Lite0, ImageNet weights"],
)
REAL: dict[str, Callable[[], Subject]] = {a.name: lambda a=a: _subject(a) for a in _ARCHITECTURES}


def _subject(architecture: Architecture) -> Subject:
    """Captured, calibrated on some inputs, and to be judged on others."""
    calibration, test = (architecture.inputs(2, np.random.default_rng(s)) for s in (_CALIBRATION, _TEST))
    model = capture(architecture.model(), calibration).onnx
    network = read(model, calibration.numpy())
    ranges = {k: (low, high) if low < high else (-1.0, 1.0) for k, (low, high) in network.ranges.items()}
    codes = formulas.quantize(test.numpy(), formulas.activation(*ranges[network.input]))
    return Subject(architecture.name, model, network, ranges, codes)
