"""Two processes that want the same cores are told so."""

import os
import warnings

import pytest
import torch
from in_the_loop import new_npu

from trainer_client.qat.machine import fit_machine


class Neighbour:
    """An NPU that computes on this process's cores."""

    def __init__(self, threads: int) -> None:
        self._npu, self.threads_here = new_npu(), threads

    def __getattr__(self, name: str) -> object:
        return getattr(self._npu, name)


@pytest.mark.parametrize(
    ("own", "beside", "fight"), [(2, 1, True), (1, 1, False), (2, 0, False), (3, 2, True), (1, 2, False)]
)
def test_a_fight_over_the_cores_is_told(
    own: int, beside: int, fight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two cores, with the remedy: where there are more threads than cores and torch has one to give."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: own)
    npu = Neighbour(beside)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit_machine(npu)  # type: ignore[arg-type]
    messages = [str(warning.message) for warning in told]
    assert len(messages) == fight
    assert not fight or "torch.set_num_threads(1)" in messages[0]
