from pathlib import Path

import pytest

from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import InvalidInput
from npu_wire.host_share import HostLayer, HostShare
from trainer_client.commands.results import (
    FP32,
    NPU,
    PTQ,
    TORCHAO,
    Cell,
    CellStore,
    Results,
    load_results,
    summarize,
)


def device(profile: str, profile_hash: str = "aa") -> Capabilities:
    """An NPU."""
    return Capabilities(Fingerprint("emulator", "v", "m", "1", profile, profile_hash), ("Conv",), 64)


HOST = HostShare((HostLayer("h", "LSTM", "why", 3),), 2, 3, 4, 5)


def results() -> Results:
    """Two seeds on one NPU and one on another."""
    numbers = [
        Cell(FP32, 0, 98.0, 1.0),
        Cell(FP32, 1, 97.0, 1.0),
        Cell(PTQ, 0, 90.0, 1.0, "p", "aa", sqnr_db={"relu": 20.0, "flat": None}),
        Cell(PTQ, 1, 94.0, 1.0, "p", "aa", host=HOST),
        Cell(TORCHAO, 0, 93.0, 1.0, "p", "aa", simulated_accuracy=97.5),
        Cell(NPU, 0, 92.0, 1.0, "p", "aa"),
        Cell(NPU, 0, 50.0, 1.0, "q", "bb"),
    ]
    return Results({"model": "m"}, (device("p"), device("q", "bb")), tuple(numbers), "npu-trainer compare")


def test_mean_and_sample_deviation() -> None:
    """Numbers of a textbook example: 2, 4, 4, 4, 5, 5, 7, 9 has mean 5 and sample variance 32 / 7."""
    summary = summarize([2, 4, 4, 4, 5, 5, 7, 9])
    assert summary is not None
    assert (summary.mean, summary.seeds) == (5, 8)
    assert summary.std**2 == pytest.approx(32 / 7)


def test_fp32_is_shared_and_the_best_is_chosen_by_mean() -> None:
    """FP32 shows on every NPU; torchao's one seed of 93 beats PTQ's mean of 92."""
    found = results()
    assert found.accuracies(FP32, "p") == found.accuracies(FP32, "q") == {0: 98.0, 1: 97.0}
    assert (found.best_quantized("p"), found.best_quantized("q")) == (TORCHAO, NPU)
    assert found.summary(PTQ, "q") is None


def test_saved_results_are_read_back(tmp_path: Path) -> None:
    """What is written equals what is read."""
    results().save(tmp_path)
    assert load_results(tmp_path) == results()
    assert load_results(tmp_path).host_share("p") == HOST


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"setup": {}, "npus": [{}], "cells": [], "command": ""}']
)
def test_a_folder_without_results_is_refused(tmp_path: Path, content: str) -> None:
    """The error names the file and the command that writes one."""
    if content:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"results\.json.*npu-trainer compare"):
        load_results(tmp_path)


def test_a_cell_is_found_only_under_what_it_depends_on(tmp_path: Path) -> None:
    """Another seed, another NPU or another recipe does not see the cell."""
    store = CellStore(tmp_path, {"steps": 150})
    cell = Cell(NPU, 0, 98.0, 1.0, "p", "aa", sqnr_db={"relu": 20.5, "flat": None})
    store.save(cell, device("p"))
    assert store.load(NPU, 0, device("p")) == cell
    assert store.load(NPU, 1, device("p")) is None
    assert store.load(NPU, 0, device("p", "changed")) is None
    assert CellStore(tmp_path, {"steps": 151}).load(NPU, 0, device("p")) is None
