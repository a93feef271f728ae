"""Train your own model against an NPU in a plain loop: `python examples/plain_loop.py [HOST:PORT]`."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainer_client

STEPS_FP32, STEPS_NPU = 300, 60


def net() -> nn.Module:
    """Any model: here a small convolutional one for 8x8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def train(
    module: nn.Module, parameters: list[nn.Parameter], loader: DataLoader, steps: int, lr: float
) -> None:
    """The loop: the same one for FP32 and for the NPU."""
    optimizer = torch.optim.Adam(parameters, lr)
    module.train()
    done = 0
    while done < steps:
        for x, y in loader:
            loss = nn.functional.cross_entropy(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


@torch.no_grad()
def accuracy(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers in percent."""
    return 100 * (module.eval()(x).argmax(1) == y).float().mean().item()


def main() -> None:
    """FP32 first, then the same parameters against the NPU."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:1100], y[:1100]), batch_size=32, shuffle=True, drop_last=True)
    x_test, y_test = x[1100:], y[1100:]

    model = net()
    train(model, list(model.parameters()), loader, STEPS_FP32, 1e-2)
    print(f"FP32                          {accuracy(model, x_test, y_test):5.1f} %")

    endpoint = sys.argv[1] if len(sys.argv) > 1 else None
    npu = trainer_client.connect(endpoint) if endpoint else trainer_client.connect(profile="acc16")
    try:
        qat = trainer_client.prepare(model, x[:2], npu)
        qat.calibrate(loader)
        print(f"on the NPU, before training   {accuracy(qat, x_test, y_test):5.1f} %")
        train(qat, list(model.parameters()), loader, STEPS_NPU, 1e-3)
        print(f"on the NPU, after training    {accuracy(qat, x_test, y_test):5.1f} %")
    finally:
        npu.close()


if __name__ == "__main__":
    main()
