"""The network that is trained in the benchmarks, and where it and its NPU run."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import trainer_client
from trainer_client.npu.connection import Connection

# expansion, width, repeats, stride
BLOCKS = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def conv(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    """Convolution, batch norm, ReLU6."""
    convolution = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), *([nn.ReLU6()] if act else []))


class Block(nn.Module):
    """Inverted residual."""

    def __init__(self, width: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        expand = [conv(width, hidden, 1)] if expansion > 1 else []
        self.body = nn.Sequential(
            *expand, conv(hidden, hidden, 3, stride, hidden), conv(hidden, out, 1, act=False)
        )
        self.residual = stride == 1 and width == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, width, h, w) to (n, out, h / stride, w / stride)."""
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al., 2018, table 2."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv(3, 32, 3, 2)]
        width = 32
        for expansion, out, repeats, stride in BLOCKS:
            for index in range(repeats):
                blocks.append(Block(width, out, stride if index == 0 else 1, expansion))
                width = out
        self.features = nn.Sequential(*blocks, conv(width, 1280, 1))
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, 1000)."""
        return self.classifier(self.features(x).mean((2, 3)))


def options(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """What such a benchmark can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--profile", default="tflm")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    return parser


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    """What numbers depend on, for whoever reads them in a file."""
    return {name: getattr(arguments, name) for name in ("size", "batch", "profile")}


def network_and_batch(arguments: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """MobileNetV2, images and labels, the same in every run; one thread computes."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (arguments.batch,))
    return MobileNetV2().to(memory_format=torch.channels_last), x, y


@contextlib.contextmanager
def npu_on_a_core_of_its_own(profile: str) -> Iterator[Connection]:
    """An embedded server on the machine's last core, and this process on its first."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])  # the embedded server inherits this
    with trainer_client.connect(profile=profile) as npu:
        os.sched_setaffinity(0, cores[:1])
        yield npu
