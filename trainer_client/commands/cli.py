"""The command `npu-trainer`."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from npu_wire.program import Command, Program
from trainer_client.commands.config import CompareSettings, DemoSettings, ReportSettings, TrainSettings

if TYPE_CHECKING:
    from trainer_client.commands.data import Dataset
    from trainer_client.commands.results import Results
    from trainer_client.commands.trainer import Recipe
    from trainer_client.npu.connection import Connection

_DEMO_PROFILES = "pow2-trunc,acc16"


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; see `Program.main`."""
    return PROGRAM.main(arguments)


def _demo(settings: DemoSettings, called: str) -> int:
    # Built without environment and file: they have spoken, and the demo's NPUs are its own.
    compared = CompareSettings.model_construct(**settings.model_dump(), profile=_DEMO_PROFILES)
    return _compare(compared, called)


def _compare(settings: CompareSettings, called: str) -> int:
    # Imported here, and below: `--help` and wrong flags do not wait for torch.
    from trainer_client.commands.compare import Plan, compare
    from trainer_client.commands.report import write_report
    from trainer_client.commands.terminal import ComparisonView, progress_view
    from trainer_client.qat.trace import Trace

    fp32, finetune, data, threads = _training(settings)
    plan = Plan(
        *(settings.model, settings.seeds, fp32, finetune, settings.calibration_images, threads),
        settings.fp32_pass,
    )
    with ExitStack() as stack:
        npus = [stack.enter_context(npu) for npu in _connect(settings, settings.profile)]
        view = ComparisonView(stack.enter_context(progress_view()), plan.seeds * (1 + 3 * len(npus)))
        trace = stack.enter_context(Trace(settings.trace)) if settings.trace else None
        results = compare(plan, data, npus, settings.out, view, called, trace)
    _show(results, write_report(results, settings.out), settings.json_)
    return 0


def _train(settings: TrainSettings, _called: str) -> int:
    from trainer_client.commands.finetune import train
    from trainer_client.commands.terminal import progress_view
    from trainer_client.qat.trace import Trace

    fp32, finetune, data, _ = _training(settings)
    with ExitStack() as stack:
        (npu,) = [stack.enter_context(npu) for npu in _connect(settings, settings.profile)]
        trace = stack.enter_context(Trace(settings.trace)) if settings.trace else None
        progress = stack.enter_context(progress_view())
        outcome = train(
            *(settings.model, data, npu, fp32, finetune, settings.seed, settings.calibration_images),
            *(settings.out, progress.begin, trace, settings.fp32_pass),
        )
        profile = npu.info.profile
    if settings.json_:
        print(json.dumps({"profile": profile, **dataclasses.asdict(outcome)}, indent=1, default=str))
        return 0
    console = Console()
    console.print(f"{'FP32':<44} {outcome.fp32:6.2f} %")
    console.print(f"{f'on {profile}, before training in the loop':<44} {outcome.before:6.2f} %")
    console.print(f"{f'on {profile}, after':<44} {outcome.after:6.2f} %")
    console.print(str(outcome.host), soft_wrap=True, markup=False)
    console.print(f"weights: {outcome.weights} (sha256 {outcome.sha256[:16]})", soft_wrap=True)
    return 0


def _report(settings: ReportSettings, _called: str) -> int:
    from trainer_client.commands.report import write_report
    from trainer_client.commands.results import load_results

    results = load_results(settings.folder)
    _show(results, write_report(results, settings.folder), settings.json_)
    return 0


def _show(results: "Results", report: Path, as_json: bool) -> None:
    from trainer_client.commands.terminal import print_results

    if as_json:
        print(json.dumps(results.document() | {"report": str(report)}, indent=1))
    else:
        print_results(Console(), results, report)


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
    from trainer_client.npu.connection import connect

    token = settings.security().token
    # No profile, backend or device: the server's defaults.
    for profile in profiles.split(",") if profiles and settings.endpoint is None else [profiles]:
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


PROGRAM = Program(
    "npu-trainer",
    "Quantization-aware training against the arithmetic of an NPU.",
    {
        "demo": Command(DemoSettings, _demo, "trainer"),
        "compare": Command(CompareSettings, _compare, "trainer"),
        "train": Command(TrainSettings, _train, "trainer"),
        "report": Command(ReportSettings, _report, "trainer"),
    },
    if_interrupted="interrupted; what is finished is kept: run the same command to go on",
)

if __name__ == "__main__":
    sys.exit(main())
