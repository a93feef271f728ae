"""From an optimizer's step to the NPU's first layer, with 14 MB of new weights on the way.

    python benchmarks/weights.py [--size 96] [--batch 32] [--rounds 6] [--profile tflm] [--write]

MobileNetV2 (3.5 M parameters, all of them changed by each step), the trainer pinned to one core and the
embedded server to another, where the machine has two. Two ways in turn, three steps each: the weights set
out with `optimizer.step()`, or, because the step is written by hand and PyTorch tells of no optimizer, with
the next forward. Medians, in ms after the step's last write: the NPU began its first layer, it began its
last, it was done. `--write` keeps them in benchmarks/results/weights.json.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine
from torch import nn
from training_step import MobileNetV2

import trainer_client
from trainer_client.qat.trace import Trace

RESULTS = Path(__file__).parent / "results" / "weights.json"
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--profile", default="tflm")
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS.name}")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (arguments.batch,))
    model = MobileNetV2().to(memory_format=torch.channels_last)
    os.sched_setaffinity(0, cores[-1:])  # the embedded server inherits this
    with trainer_client.connect(profile=arguments.profile) as npu:
        os.sched_setaffinity(0, cores[:1])
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
        setting = {"size": arguments.size, "batch": arguments.batch, "profile": arguments.profile}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine(), **setting, "ms": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
