"""Fitting this process to its machine: memory that is kept, and cores that are shared with a server."""

import os
import warnings
from typing import Protocol, runtime_checkable

import torch

from npu_wire.allocator import keep_freed_memory
from trainer_client.npu.session import Npu


@runtime_checkable
class SharesCores(Protocol):
    """An extra ability of an NPU: to tell that it computes on this process's own cores."""

    @property
    def threads_here(self) -> int:
        """Threads that compute beside this process; 0: none of which it knows."""
        ...


def fit_machine(npu: Npu) -> None:
    """Keeps freed memory for the next step, and warns where torch and the NPU want more cores than there are.

    Args:
        npu: that this process trains with.
    """
    keep_freed_memory()
    beside = npu.threads_here if isinstance(npu, SharesCores) else 0
    cores, own = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if beside and own > 1 and own + beside > cores:
        warnings.warn(
            f"torch computes with {own} threads and the embedded NPU with {beside}, on {cores} cores: each "
            "waits for the other's, and a step can take ten times as long. Call "
            f"torch.set_num_threads({max(1, cores - beside)}), or set OMP_NUM_THREADS",
            stacklevel=4,
        )
