import dataclasses
from pathlib import Path

import pytest
import torch
from in_process_npu import InProcessNpu

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import Backend, BackendOptions
from npu_wire.errors import InvalidInput
from trainer_client.commands.compare import Plan, compare
from trainer_client.commands.data import Dataset, digits
from trainer_client.commands.results import FP32, NPU, PTQ, TORCHAO, Cell, Results, load_results
from trainer_client.commands.trainer import OnStep, Recipe

PLAN = Plan(
    model="mobilenet-v1-small",
    seeds=1,
    fp32=Recipe(30, 64, 0.05, "sgd-onecycle"),
    finetune=Recipe(3, 16, 1e-3, "adam-cosine"),
    calibration_images=64,
    threads=1,
)


class StopError(Exception):
    """Stands for Ctrl-C."""


class Recorder:
    """A `Watcher` that keeps what it is told, and stops the run after some cells."""

    def __init__(self, stop_after: int = 99) -> None:
        self.trainings: list[str] = []
        self.cells: list[Cell] = []
        self._stop_after = stop_after

    def begin(self, what: str, steps: int) -> OnStep:
        def on_step(step: int, loss: float) -> None:
            if step == 1:
                self.trainings.append(what)

        return on_step

    def finished(self, cell: Cell) -> None:
        self.cells.append(cell)
        if len(self.cells) == self._stop_after:
            raise StopError


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Real digits, fewer to test on."""
    whole = digits()
    return dataclasses.replace(whole, test_x=whole.test_x[:100], test_y=whole.test_y[:100])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def npu(backend: type[Backend], profile: str) -> InProcessNpu:
    """An NPU in this process."""
    device = backend(BackendOptions(profile=profile))
    device.open()
    return InProcessNpu(device)


def numbers(results: Results) -> list[tuple[str, int, str, float]]:
    """What a table is made of."""
    return [(cell.method, cell.seed, cell.profile, cell.accuracy) for cell in results.cells]


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, data: Dataset) -> None:
    """Stopped after five of seven cells, a rerun keeps the five files and trains only what is missing."""
    npus = [npu(EmulatorBackend, "pow2-trunc"), npu(EmulatorBackend, "acc16")]
    with pytest.raises(StopError):
        compare(PLAN, data, npus, tmp_path / "a", Recorder(stop_after=5), "", None)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "cells").iterdir()}
    assert len(kept) == len(load_results(tmp_path / "a").cells) == 5

    second = Recorder()
    resumed = compare(PLAN, data, npus, tmp_path / "a", second, "", None)
    assert second.trainings == ["NPU in the loop, pow2-trunc, seed 0", "NPU in the loop, acc16, seed 0"]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    whole = Recorder()
    assert numbers(compare(PLAN, data, npus, tmp_path / "b", whole, "", None)) == numbers(resumed)
    assert whole.trainings[:2] == ["FP32, seed 0", "torchao QAT, seed 0"]  # once for both NPUs
    methods = [FP32, PTQ, PTQ, TORCHAO, TORCHAO, NPU, NPU]
    assert [cell.method for cell in resumed.cells] == methods


@pytest.mark.slow
def test_reference_and_emulator_give_the_same_table(tmp_path: Path, data: Dataset) -> None:
    """Two implementations of one arithmetic, each training for itself, agree in every cell and layer."""
    tables = [
        compare(PLAN, data, [npu(backend, "acc16")], tmp_path / backend.__name__, Recorder(), "", None)
        for backend in (ReferenceBackend, EmulatorBackend)
    ]
    assert numbers(tables[0]) == numbers(tables[1])
    for one, other in zip(tables[0].cells, tables[1].cells, strict=True):
        assert one.sqnr_db == other.sqnr_db
        assert one.host == other.host
    ptq = tables[0].cell(PTQ, "acc16", 0)
    torchao = tables[0].cell(TORCHAO, "acc16", 0)
    assert ptq is not None
    assert torchao is not None
    assert ptq.host is not None
    assert (ptq.host.layers, ptq.host.of_layers) == ((), 13 + 2)  # convolutions, mean, logits
    # The image, thirteen convolutions and the mean have an observer in torchao's graph, the logits have none.
    assert (torchao.ranges_from_method, len(ptq.sqnr_db)) == (15, 16)


def test_two_npus_of_one_name_are_refused(tmp_path: Path, data: Dataset) -> None:
    """Their columns could not be told apart."""
    npus = [npu(EmulatorBackend, "acc16"), npu(EmulatorBackend, "acc16")]
    with pytest.raises(InvalidInput, match="same profile: acc16, acc16"):
        compare(PLAN, data, npus, tmp_path, Recorder(), "", None)
