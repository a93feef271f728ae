"""Two small image classifiers of the kinds that NPUs run, and the door for a user's own."""

import math
from collections.abc import Callable

import torch
from torch import nn

from npu_wire.errors import InvalidInput
from trainer_client.commands.data import load_object

_BN_EPS = 1e-3


class MobileNetV1Small(nn.Module):
    """Depthwise separable convolutions, no residuals, unbounded ReLU: hard to quantize. 28 k parameters.

    After Howard et al., "MobileNets", 2017.
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        blocks = [_conv_bn(channels, 16, 3, stride=2, activation=nn.ReLU)]
        width = 16
        for out, stride in [(32, 1), (48, 2), (48, 1), (64, 1), (96, 2), (96, 1)]:
            blocks.append(_conv_bn(width, width, 3, stride=stride, groups=width, activation=nn.ReLU))
            blocks.append(_conv_bn(width, out, 1, activation=nn.ReLU))
            width = out
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width, classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of shape (n, channels, height, width)."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class MobileNetV2Small(nn.Module):
    """Inverted residuals with linear bottlenecks and ReLU6 (67 k parameters).

    After Sandler et al., "MobileNetV2", 2018.
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_conv_bn(channels, 16, 3, stride=2, activation=nn.ReLU6)]
        width = 16
        for out, repeats, stride, expansion in [(16, 1, 1, 1), (24, 2, 2, 4), (32, 2, 1, 4), (48, 2, 2, 4)]:
            for index in range(repeats):
                blocks.append(_InvertedResidual(width, out, stride if index == 0 else 1, expansion))
                width = out
        blocks.append(_conv_bn(width, 128, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(128, classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images of shape (n, channels, height, width)."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class _InvertedResidual(nn.Module):
    def __init__(self, width: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        expand = [_conv_bn(width, hidden, 1, activation=nn.ReLU6)] if expansion > 1 else []
        self.body = nn.Sequential(
            *expand,
            _conv_bn(hidden, hidden, 3, stride=stride, groups=hidden, activation=nn.ReLU6),
            _conv_bn(hidden, out, 1),
        )
        self.residual = stride == 1 and width == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return x + y if self.residual else y  # type: ignore[no-any-return]


def _conv_bn(
    width: int,
    out: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=_BN_EPS),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # He et al., fan out; a depthwise filter's fan out is its own kernel, whatever the channel count.
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


_NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "mobilenet-v1-small": MobileNetV1Small,
    "mobilenet-v2-small": MobileNetV2Small,
}


def build_model(name: str, classes: int, channels: int) -> nn.Module:
    """Builds a network of ours by name, or calls a user's own `package.module:factory` (no arguments).

    Weights come from torch's global generator: seed it first.

    Raises:
        InvalidInput: unknown name, or a factory that returns no `nn.Module`.
    """
    if name in _NETS:
        return _NETS[name](classes, channels)
    if ":" not in name:
        raise InvalidInput(
            f"unknown model {name!r}; choose {', '.join(_NETS)} or your own package.module:factory"
        )
    model = load_object(name)()
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"{name} returned {type(model).__name__}; return a torch.nn.Module instead")
    return model
