"""Large blocks are kept between two uses, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import ctypes
import resource
import numpy as np
from npu_wire.allocator import keep_freed_memory

PR_SET_THP_DISABLE = 41  # <linux/prctl.h>: else one fault may bring 2 MB, where the machine has them
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
keep_freed_memory()
for round in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(64 * 2**20 // 8) for _ in range(2)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults and glibc are Linux's")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "100000"}, False)])
def test_large_blocks_are_kept_unless_the_user_chose(environment: dict[str, str], kept: bool) -> None:
    """The fourth use of 128 MB has no page faults; with the user's own setting it has one for every page."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", _SCRIPT]
    run = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    faults = int(run.stdout)
    assert faults < 100 if kept else faults > 1000
