"""From an optimizer's step to the NPU's first layer, with 14 MB of new weights on the way.

    python benchmarks/weights.py [--size 96] [--batch 32] [--rounds 6] [--profile tflm] [--write]

MobileNetV2 (3.5 M parameters, all of them changed by each step), the trainer pinned to one core and the
embedded server to another, where the machine has two. Two ways in turn, three steps each: the weights set
out with `optimizer.step()`, or, because the step is written by hand and PyTorch tells of no optimizer, with
the next forward. Medians, in ms after the step's last write: the NPU began its first layer, it began its
last, it was done. `--write` keeps them in benchmarks/results/weights.json.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from keeping import keep
from mobilenet import network_and_batch, npu_on_a_core_of_its_own, options, setting
from torch import nn

import trainer_client
from trainer_client.qat.trace import Trace

RATE = 1e-4
MOMENTS = ("first layer", "last layer", "done")


def by_optimizer(qat: nn.Module) -> Callable[[], None]:
    """A step that PyTorch tells of."""
    optimizer = torch.optim.SGD(qat.parameters(), RATE)
    return lambda: optimizer.step()


def by_hand(qat: nn.Module) -> Callable[[], None]:
    """A step that it does not."""

    def step() -> None:
        with torch.no_grad():
            for parameter in qat.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-RATE)

    return step


WAYS = {"with the step": by_optimizer, "with the forward": by_hand}


class Contestant:
    """A model of its own in the loop, and how it steps."""

    def __init__(self, qat: nn.Module, step: Callable[[], None], trace: Trace) -> None:
        self._qat, self._step, self._trace = qat, step, trace
        self._written_ns = 0
        self._rows: list[dict[str, float]] = []

    def turn(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Three training steps, and a row about each forward that comes right after a step."""
        for i in range(3):
            seen = len(self._trace.document["traceEvents"])
            loss = nn.functional.cross_entropy(self._qat(x), y)
            events = self._trace.document["traceEvents"][seen:]
            layers = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
            last = layers[-1]
            moments = (layers[0]["ts"], last["ts"], last["ts"] + last["dur"])
            after = [moment / 1e3 - self._written_ns / 1e6 for moment in moments]
            if i:
                self._rows.append(dict(zip(MOMENTS, after, strict=True)))
            self._qat.zero_grad()
            loss.backward()
            self._step()
            self._written_ns = time.monotonic_ns()

    def medians(self) -> dict[str, float]:
        """Over the turns but the first one."""
        return {name: statistics.median(row[name] for row in self._rows[2:]) for name in MOMENTS}


def main() -> None:
    """Prints the table."""
    arguments = options(__doc__, rounds=6).parse_args()
    model, x, y = network_and_batch(arguments)
    with npu_on_a_core_of_its_own(arguments.profile) as npu:
        contestants = {}
        for name, way in WAYS.items():
            trace = Trace(os.devnull)
            qat = trainer_client.prepare(copy.deepcopy(model), x, npu, trace=trace).calibrate(x).train()
            contestants[name] = Contestant(qat, way(qat), trace)
        for _ in range(arguments.rounds + 1):  # the first one compiles kernels and warms caches
            for contestant in contestants.values():
                contestant.turn(x, y)
    table = {name: contestant.medians() for name, contestant in contestants.items()}
    print(f"MobileNetV2@{arguments.size}, batch {arguments.batch}, {arguments.profile}; ms after the step")
    for name, row in table.items():
        print(f"{name:18s}" + "".join(f"{moment:>12s} {ms:6.1f}" for moment, ms in row.items()))
    early, late = (table[name]["first layer"] for name in WAYS)
    print(f"first layer, {' / '.join(WAYS)}: ratio {early / late:.2f}")
    if arguments.write:
        keep("weights", **setting(arguments), ms=table)


if __name__ == "__main__":
    main()
