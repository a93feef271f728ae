"""One network in the loop: what runs, what is equal, what is refused and why."""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures.side_by_side import SideBySideNpu
from torch import Tensor, nn
from torch.utils import _pytree

from npu_wire.errors import NpuError
from trainer_client.qat.module import prepare

from .networks import Network

BATCH = 2
PROFILE = "tflm"


@dataclass
class Outcome:
    """What came of a network.

    Attributes:
        name: the network's.
        group: its heading in the table.
        status: "runs", "refused", "foreign exception", "needs a package", "not built", "no time", "crashed";
            "runs" means that it trained a step, whatever the figures say.
        stage: what was being done when it ended otherwise.
        reason: the sentence, or the exception.
        parameters: float numbers that the model trains.
        layers: INT8 tensors.
        host_layers: of them, by the host in float.
        elements: INT8 numbers compared between both backends.
        mismatches: of them, that differ.
        outputs: numbers that the model returned.
        unequal_outputs: of them, that differ between training forward and evaluation, bit by bit.
        gradients: parameters that FP32 gives a gradient.
        bad_gradients: names of those without one, or without a finite one, in the loop.
        seconds: of all this.
        commit: of the code that was examined, where it is known.
    """

    name: str
    group: str
    status: str = "crashed"
    stage: str = "start"
    reason: str = ""
    parameters: int = 0
    layers: int = 0
    host_layers: int = 0
    elements: int = 0
    mismatches: int = 0
    outputs: int = 0
    unequal_outputs: int = 0
    gradients: int = 0
    bad_gradients: list[str] = field(default_factory=list)
    seconds: float = 0.0
    commit: str = ""

    @property
    def good(self) -> bool:
        """Whether it runs, and every figure is as it should be."""
        return self.status == "runs" and not (self.mismatches or self.unequal_outputs or self.bad_gradients)


def examine(network: Network, outcome: Outcome) -> None:
    """Takes a network through the loop; `outcome` holds how far it got at any time."""
    started = time.monotonic()
    try:
        _examine(network, outcome)
        outcome.status = "runs"
    except NpuError as error:
        outcome.status, outcome.reason = "refused", f"{type(error).__name__}: {error}"
    except _Unbuilt as error:
        outcome.status, outcome.reason = error.args
    except Exception as error:
        outcome.status, outcome.reason = "foreign exception", f"{type(error).__name__}: {error}"
    outcome.seconds = round(time.monotonic() - started, 1)


class _Unbuilt(Exception):
    """The network is none of this installation: status and reason."""


def _examine(network: Network, outcome: Outcome) -> None:
    random = torch.Generator().manual_seed(1)
    outcome.stage = "build"
    model = _built(network)
    outcome.parameters = sum(p.numel() for p in model.parameters())
    batch, other = (network.batch(model, BATCH, random) for _ in range(2))
    outcome.stage = "FP32"
    try:
        wanted = _gradients(model, model(**batch))
    except Exception as error:
        raise _Unbuilt("not built", f"FP32: {type(error).__name__}: {error}") from error
    outcome.gradients = len(wanted)

    npu = SideBySideNpu(PROFILE)
    outcome.stage = "prepare"
    qat = prepare(model, dict(batch), npu)
    outcome.stage = "calibrate"
    qat.calibrate([dict(other), dict(batch)])
    outcome.layers = len(qat.layer_map.layers)
    outcome.host_layers = sum(layer.host_float for layer in qat.layer_map.layers)
    outcome.stage = "train"
    trained = qat.train()(**batch)
    got = _gradients(model, trained)
    outcome.bad_gradients = [n for n in wanted if n not in got or not bool(torch.isfinite(got[n]).all())]
    outcome.stage = "evaluate"
    with torch.no_grad():
        evaluated = qat.eval()(**batch)
    outcome.elements = sum(npu.comparison.elements.values())
    outcome.mismatches = sum(npu.comparison.mismatches.values())
    pairs = list(zip(_tensors(trained), _tensors(evaluated), strict=True))
    outcome.outputs = sum(a.numel() for a, _ in pairs)
    outcome.unequal_outputs = sum(_differing(a, b) for a, b in pairs)
    outcome.stage = "end"


def _built(network: Network) -> nn.Module:
    try:
        return network.model()
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise _Unbuilt("needs a package", package[1] if package else str(error)) from error
    except Exception as error:
        raise _Unbuilt("not built", f"{type(error).__name__}: {error}") from error


def _tensors(output: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _differing(one: Tensor, other: Tensor) -> int:
    """Elements that differ in a bit; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return max(one.numel(), other.numel())
    return int(((one != other) & ~((one != one) & (other != other))).sum())


def _gradients(model: nn.Module, output: Any) -> Mapping[str, Tensor]:
    """Gradients of a loss in which every output has its own fixed random weight, by parameter."""
    model.zero_grad()
    torch.manual_seed(2)
    leaves = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum((leaf * torch.randn_like(leaf)).sum() for leaf in leaves).backward()  # type: ignore[union-attr]
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
