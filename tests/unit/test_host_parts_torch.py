"""PyTorch models with parts that the NPU's host computes, trained and evaluated in the loop."""

import math

import pytest
import torch
from in_process_npu import InProcessNpu
from torch import Tensor, nn

from npu_server.backends.emulator.backend import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from trainer_client import prepare


class Recurrent(nn.Module):
    """A classifier over a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(20, 4)
        self.lstm = nn.LSTM(8, 10, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.into(x))[0][:, -1])


class Masked(nn.Module):
    """Attention to the tokens that a boolean input lets through; the others get minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 3
        shares = scores.masked_fill(~mask[:, None, :], -math.inf).softmax(-1)
        return self.out((shares @ x).mean(1))


class Cell(nn.Module):
    """An LSTM cell, unrolled from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 10)
        for step in range(x.shape[1]):
            h, c = self.cell(x[:, step], (h, c))
        return self.out(h)


class Tokens(nn.Module):
    """Token ids to classes: embedding and GRU on the host, the rest on the NPU."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8), nn.Linear(10, 4)
        self.gru = nn.GRU(8, 10, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.gru(self.table(ids))[1][-1])


MASK = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 4 + [False]])
CASES = {
    "bidirectional LSTM": (Recurrent, lambda: (torch.randn(3, 5, 6),)),
    "mask of minus infinity": (Masked, lambda: (torch.randn(3, 5, 8), MASK)),
    "unrolled cell": (Cell, lambda: (torch.randn(3, 3, 6),)),
    "token ids": (Tokens, lambda: (torch.randint(0, 20, (3, 5)),)),
}


SLOW = ("unrolled cell", "token ids")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_trains_in_the_loop(name: str) -> None:
    """Evaluation equals the training forward, the backends agree, and values stay near the float model's."""
    make, batch = CASES[name]
    torch.manual_seed(0)
    model, x = make(), batch()
    with torch.no_grad():
        expected = model(*x)
    values = []
    for backend in (ReferenceBackend, EmulatorBackend):
        model.zero_grad()
        qat = prepare(model, x, InProcessNpu(backend(BackendOptions(profile="tflm"))))
        qat.calibrate([x])
        trained = qat.train()(*x)
        trained.square().sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        with torch.no_grad():
            values.append(qat.eval()(*x))
        assert torch.equal(trained.detach(), values[-1])
    assert torch.equal(*values)
    assert (values[0] - expected).abs().max() < 0.06 * expected.abs().max()
    with torch.no_grad():  # the weights of the host's part are pushed like all others
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(qat(*x), values[0])
