"""Cost of one training step with the NPU in the loop, side by side with its peers: time, anatomy, memory.

    python benchmarks/training_step.py [--size 96] [--batch 32] [--rounds 9] [--profile tflm] [--write]

MobileNetV2 (3.5 M parameters). In every round each contestant takes one step in turn, so a machine that slows
down slows all of them; medians and their ratio to plain FP32 training are printed. The trainer is pinned to
one core with one thread and the embedded server to another, where the machine has two. Peak memory is that of
some steps in a process of the contestant's own, after everything is prepared. `--write` keeps the numbers in
benchmarks/results/training_step.json.
"""

import argparse
import contextlib
import copy
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from keeping import keep
from mobilenet import network_and_batch, npu_on_a_core_of_its_own, options, setting
from torch import nn

import trainer_client
from trainer_client.commands.baselines import prepare_torchao
from trainer_client.qat.trace import Trace

PLAIN = "FP32, batch norm trains"
IN_THE_LOOP = {"NPU, always": "always", "NPU, where_needed": "where_needed"}
PHASES = ("forward", "backward", "optimizer")
MEMORY_STEPS = 5

Step = Callable[[], dict[str, float]]
"""Takes a training step; returns the seconds of each of `PHASES`."""


def step_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Step:
    """An SGD step on `module`."""
    optimizer = torch.optim.SGD(module.parameters(), 1e-4)

    def step() -> dict[str, float]:
        marks = [time.perf_counter()]
        loss = nn.functional.cross_entropy(module(x), y)
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        return {phase: end - start for phase, start, end in zip(PHASES, marks, marks[1:], strict=False)}

    return step


@contextlib.contextmanager
def contestants(
    arguments: argparse.Namespace, names: list[str], traces: dict[str, Trace]
) -> Iterator[dict[str, Step]]:
    """The named contestants' steps; `traces` gets what the NPU in the loop does."""
    model, x, y = network_and_batch(arguments)
    peers: dict[str, Callable[[], nn.Module]] = {
        PLAIN: lambda: copy.deepcopy(model).train(),
        "FP32, batch norm frozen": lambda: copy.deepcopy(model).eval(),
        "torchao PT2E QAT": lambda: prepare_torchao(copy.deepcopy(model), x),
    }
    with contextlib.ExitStack() as stack:
        npu = None
        if any(name in IN_THE_LOOP for name in names):
            npu = stack.enter_context(npu_on_a_core_of_its_own(arguments.profile))
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        steps = {}
        for name in names:
            if name in IN_THE_LOOP:
                assert npu is not None
                traces[name] = Trace(os.devnull)
                prepare: Any = functools.partial(trainer_client.prepare, fp32_pass=IN_THE_LOOP[name])
                qat = prepare(copy.deepcopy(model), x, npu, trace=traces[name], full_pass_every=0)
                module: nn.Module = qat.calibrate(x).train()
            else:
                module = peers[name]()
            steps[name] = step_of(module, x, y)
        yield steps


ALL = [PLAIN, "FP32, batch norm frozen", "torchao PT2E QAT", *IN_THE_LOOP]


def time_steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians in ms: each contestant's phases, and for the NPU in the loop how the forward is spent."""
    traces: dict[str, Trace] = {}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ALL}
    with contestants(arguments, ALL, traces) as steps:
        for round_ in range(arguments.rounds + 2):
            for name, step in steps.items():
                phases = step()
                if round_ >= 2:  # the first ones compile kernels and warm caches
                    taken[name].append(phases)
    table: dict[str, Any] = {}
    for name, rows in taken.items():
        table[name] = {p: statistics.median(row[p] for row in rows) * 1e3 for p in PHASES}
        table[name]["step"] = statistics.median(sum(row.values()) for row in rows) * 1e3
    for name, trace in traces.items():
        table[name]["of the forward"] = anatomy(trace, skip=2)
    return table


def anatomy(trace: Trace, skip: int) -> dict[str, float]:
    """Medians over batches, in ms: FP32 layers, waiting, injection; and the NPU's own work beside them."""
    batches: dict[int, dict[str, float]] = {}
    for event in trace.document["traceEvents"]:
        if event["ph"] == "X":
            kind = {1: "NPU", 3: event["name"]}.get(event["pid"], "")
            kind = kind if kind in ("NPU", "wait", "inject") else "FP32"
            row = batches.setdefault(
                event["args"]["batch"], dict.fromkeys(("FP32", "wait", "inject", "NPU"), 0.0)
            )
            row[kind] += event["dur"] / 1e3
    rows = list(batches.values())[skip:]
    return {kind: statistics.median(row[kind] for row in rows) for kind in rows[0]}


def measure_memory(arguments: argparse.Namespace, name: str) -> None:
    """Prints this process's peak memory over some steps, in MB."""
    with contestants(arguments, [name], {}) as steps:
        steps[name]()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of preparing (proc(5))
        for _ in range(MEMORY_STEPS):
            steps[name]()
        status = Path("/proc/self/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(peak) / 1024)


def peak_memory(name: str) -> float:
    """`measure_memory` in a child process, with this one's arguments."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    """Prints the table."""
    parser = options(__doc__, rounds=9)
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--memory-of", choices=ALL, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments, arguments.memory_of)
        return
    table = time_steps(arguments)
    for name, row in table.items():
        row["peak MB"] = math.nan if arguments.no_memory else peak_memory(name)
    report(table, arguments)


def report(table: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the table, and keeps it."""
    print(
        f"MobileNetV2@{arguments.size}, batch {arguments.batch}, {arguments.profile}, 1 thread each; ms, MB"
    )
    print(f"{'':24s} {'step':>6s} {'ratio':>6s}" + "".join(f"{p:>10s}" for p in PHASES) + "      peak  ratio")
    base = table[PLAIN]
    for name, row in table.items():
        phases = "".join(f"{row[phase]:10.0f}" for phase in PHASES)
        memory = f"{row['peak MB']:10.0f} {row['peak MB'] / base['peak MB']:6.2f}"
        print(f"{name:24s} {row['step']:6.0f} {row['step'] / base['step']:6.2f}{phases}{memory}")
    for name in IN_THE_LOOP:
        parts = ", ".join(f"{kind} {ms:.0f}" for kind, ms in table[name]["of the forward"].items())
        print(f"{name}: of the forward, {parts}")
    if arguments.write:
        keep("training_step", **setting(arguments), ms=table)


if __name__ == "__main__":
    main()
