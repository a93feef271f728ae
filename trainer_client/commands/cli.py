"""The command `npu-trainer`."""

import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console

from npu_wire.errors import NpuError
from trainer_client.commands.config import CompareSettings, DemoSettings, TrainSettings, load_settings

if TYPE_CHECKING:
    from trainer_client.commands.data import Dataset
    from trainer_client.commands.trainer import OnStep, Recipe
    from trainer_client.npu.connection import Connection

_USAGE = """usage: npu-trainer COMMAND [options]

Quantization-aware training against the arithmetic of an NPU.

commands:
  demo      compare four ways to deploy a network to two NPUs, on handwritten digits
  compare   the same on your own model, data and NPU
  train     train one model in FP32, then with the NPU in the loop
  report    write report.html again from the results in a folder

npu-trainer COMMAND --help shows the options of a command.
"""
_DEMO_PROFILES = "pow2-trunc,acc16"
_DEFAULT_PROFILE = "pow2-trunc"
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    if command not in (*_COMMANDS, "report"):
        print(_USAGE + (f"\nerror: unknown command '{command}'" if command else ""), file=sys.stderr)
        return 2
    debug = False
    try:
        if command == "report":
            return _report(rest)
        kind, run = _COMMANDS[command]
        settings = load_settings(kind, rest, f"npu-trainer {command}")
        debug = settings.debug
        return run(settings, shlex.join(["npu-trainer", command, *rest]))
    except ValidationError as error:
        for problem in error.errors():
            where = "-".join(str(part) for part in problem["loc"]).replace("_", "-")
            message = problem["msg"].removeprefix("Value error, ")
            print(f"error: {f'--{where}: ' if where else ''}{message}", file=sys.stderr)
        return 2
    except NpuError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept: run the same command to go on", file=sys.stderr)
        return _INTERRUPTED


def _demo(settings: DemoSettings, command: str) -> int:
    # Built without environment and file: they have spoken, and the demo's NPUs are its own.
    compared = CompareSettings.model_construct(**settings.model_dump(), profile=_DEMO_PROFILES)
    return _compare(compared, command)


def _compare(settings: CompareSettings, command: str) -> int:
    # Imported here, and below: `--help` and wrong flags do not wait for torch.
    from trainer_client.commands.compare import Plan, compare
    from trainer_client.commands.report import write_report
    from trainer_client.commands.terminal import ProgressView, print_results
    from trainer_client.qat.trace import Trace

    console = Console()
    fp32, finetune, data, threads = _training(settings)
    plan = Plan(settings.model, settings.seeds, fp32, finetune, settings.calibration_images, threads)
    with ExitStack() as stack:
        npus = [stack.enter_context(npu) for npu in _connect(settings, settings.profile)]
        view = stack.enter_context(ProgressView(console, plan.seeds * (1 + 3 * len(npus))))
        trace = stack.enter_context(Trace(settings.trace)) if settings.trace else None
        results = compare(plan, data, npus, settings.out, view, command, trace)
    report = write_report(results, settings.out)
    print_results(console, results, report)
    return 0


def _train(settings: TrainSettings, _command: str) -> int:
    from rich.progress import Progress

    from trainer_client.commands.finetune import train
    from trainer_client.qat.trace import Trace

    console = Console()
    fp32, finetune, data, _ = _training(settings)
    with ExitStack() as stack:
        (npu,) = [stack.enter_context(npu) for npu in _connect(settings, settings.profile)]
        trace = stack.enter_context(Trace(settings.trace)) if settings.trace else None
        progress = stack.enter_context(Progress(console=console))

        def begin(what: str, steps: int) -> "OnStep":
            task = progress.add_task(what, total=steps)
            return lambda step, loss: progress.update(
                task, completed=step, description=f"{what}, loss {loss:.3f}"
            )

        outcome = train(
            *(settings.model, data, npu, fp32, finetune, settings.seed, settings.calibration_images),
            *(settings.out, begin, trace),
        )
        profile = npu.info.profile
    console.print(f"{'FP32':<44} {outcome.fp32:6.2f} %")
    console.print(f"{f'on {profile}, before training in the loop':<44} {outcome.before:6.2f} %")
    console.print(f"{f'on {profile}, after':<44} {outcome.after:6.2f} %")
    console.print(f"weights: {outcome.weights} (sha256 {outcome.sha256[:16]})", soft_wrap=True)
    return 0


_COMMANDS: dict[str, tuple[type[Any], Callable[[Any, str], int]]] = {
    "demo": (DemoSettings, _demo),
    "compare": (CompareSettings, _compare),
    "train": (TrainSettings, _train),
}


def _report(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: npu-trainer report RUN_DIR\n\nWrites RUN_DIR/report.html from RUN_DIR/results.json.")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    from trainer_client.commands.report import write_report
    from trainer_client.commands.results import load_results
    from trainer_client.commands.terminal import print_results

    directory = Path(arguments[0])
    results = load_results(directory)
    report = write_report(results, directory)
    console = Console()
    print_results(console, results, report)
    return 0


def _training(settings: CompareSettings | TrainSettings) -> "tuple[Recipe, Recipe, Dataset, int]":
    """FP32 recipe, fine-tuning recipe, data and torch's number of threads, which it also sets."""
    import torch

    from trainer_client.commands.data import load_dataset
    from trainer_client.commands.trainer import FINETUNE_RECIPE, FP32_RECIPES

    cores = len(os.sched_getaffinity(0))
    threads = settings.threads or max(1, cores - max(1, cores // 2))  # an embedded server takes half
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    data = load_dataset(settings.dataset, settings.data_dir)
    fp32 = FP32_RECIPES.get(data.name, FP32_RECIPES["digits"])
    if settings.fp32_steps is not None:
        fp32 = dataclasses.replace(fp32, steps=settings.fp32_steps)
    if settings.fp32_lr is not None:
        fp32 = dataclasses.replace(fp32, lr=settings.fp32_lr)
    finetune = dataclasses.replace(
        FINETUNE_RECIPE, steps=settings.qat_steps, lr=settings.qat_lr, batch_size=settings.qat_batch_size
    )
    return fp32, finetune, data, threads


def _connect(settings: CompareSettings | TrainSettings, profiles: str | None) -> "Iterator[Connection]":
    """Connections to the NPU behind the endpoint, or to an embedded one for each profile.

    Raises:
        InvalidInput: a setting of the embedded server beside an endpoint, or a token file that holds none.
    """
    from npu_wire.channel import read_token
    from trainer_client.npu.connection import connect

    token = read_token(settings.token_file) if settings.token_file else None
    for profile in (profiles or _DEFAULT_PROFILE).split(",") if settings.endpoint is None else [profiles]:
        yield connect(
            settings.endpoint,
            profile=profile and profile.strip(),
            backend=settings.backend,
            device=settings.device,
            tls=settings.tls,
            tls_ca=settings.tls_ca,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            token=token,
            timeout_s=settings.timeout_s,
            reconnect_timeout_s=settings.reconnect_timeout_s,
        )
