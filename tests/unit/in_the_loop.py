"""A small network in the loop with an NPU in the process of the test."""

import torch
from in_process_npu import InProcessNpu, SegmentBackend
from small_nets import images, residual_net
from torch import nn

from npu_server.seam import BackendOptions
from npu_wire.layer_map import MemoryLayout
from trainer_client.qat.module import QatModule, prepare

LABELS = torch.arange(8) % 5


def new_npu(layout: MemoryLayout = MemoryLayout.CHANNELS_LAST) -> InProcessNpu:
    """An NPU with real INT8 tensors, for each test its own."""
    return InProcessNpu(SegmentBackend(BackendOptions(), layout))


def prepared(npu: InProcessNpu, net: nn.Module | None = None) -> QatModule:
    """A network on the NPU, calibrated."""
    qat = prepare(residual_net() if net is None else net, images(1), npu)
    return qat.calibrate([(images(16), None)])


def train(qat: QatModule, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Trains on one batch a step; the loss of each step."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qat(images(8, seed=step)), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
