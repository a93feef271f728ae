"""The machine that a benchmark ran on, for its JSON."""

import os
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Processor's name and the cores that this process may use; Linux."""
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].partition("\n")[0]
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
