"""Cost of one training step with the NPU in the loop, side by side with its peers.

    python benchmarks/training_step.py [--size 96] [--batch 32] [--rounds 9] [--profile tflm]

MobileNetV2 (3.5 M parameters). In every round each contestant takes one step in turn, so a machine that slows
down slows all of them; medians and their ratio to plain FP32 training are printed. The trainer is pinned to
one core with one thread and the embedded server to another, where the machine has two.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import trainer_client
from trainer_client.commands.baselines import prepare_torchao

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


def step_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], float]:
    """One SGD step on `module`, as a function that returns its seconds."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-4)

    def step() -> float:
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", default="tflm")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))

    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size).to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (arguments.batch,))
    model = MobileNetV2().to(memory_format=torch.channels_last)

    os.sched_setaffinity(0, cores[-1:])  # the embedded server inherits this
    with trainer_client.connect(profile=arguments.profile) as npu:
        os.sched_setaffinity(0, cores[:1])
        qat = trainer_client.prepare(copy.deepcopy(model), x, npu)
        qat.calibrate(x)
        contestants = {
            "FP32, batch norm trains": step_of(copy.deepcopy(model).train(), x, y),
            "FP32, batch norm frozen": step_of(copy.deepcopy(model).eval(), x, y),
            "torchao PT2E QAT": step_of(prepare_torchao(copy.deepcopy(model), x), x, y),
            "NPU in the loop, staleness 0": step_of(qat.train(), x, y),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(arguments.rounds + 2):
            for name, step in contestants.items():
                elapsed = step()
                if round_ >= 2:  # the first ones compile kernels and warm caches
                    seconds[name].append(elapsed)
    base = statistics.median(seconds["FP32, batch norm trains"])
    print(
        f"MobileNetV2@{arguments.size}, batch {arguments.batch}, profile {arguments.profile}, 1 thread each"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:32s} {median * 1e3:7.0f} ms   min {min(values) * 1e3:5.0f}   ratio {median / base:5.2f}"
        )


if __name__ == "__main__":
    main()
