"""Networks small enough to check by hand, with everything the client has to deal with."""

import torch
from torch import Tensor, nn


class ResidualNet(nn.Module):
    """Batch norm with and without conv bias, ReLU6, ReLU, a residual, a mean, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.stem_act = nn.ReLU6()
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.body_norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem_act(self.stem_norm(self.stem(x)))
        h = h + torch.relu(self.body_norm(self.body(h)))
        return self.head(self.dropout(h.mean((2, 3))))


def residual_net(seed: int = 0) -> ResidualNet:
    """A net whose batch norms have seen data, so that folding them changes every number."""
    torch.manual_seed(seed)
    net = ResidualNet()
    with torch.no_grad():
        for norm in (net.stem_norm, net.body_norm):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.uniform_(-0.5, 0.5)
        for _ in range(5):
            net(torch.randn(16, 3, 8, 8))
    return net


def images(count: int, seed: int = 1) -> Tensor:
    """Float32 images of shape (count, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
