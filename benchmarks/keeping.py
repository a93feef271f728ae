"""Where a benchmark's numbers are kept, with the machine that they are of."""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _machine() -> dict[str, str | int]:
    """Processor's name and the cores that this process may use; Linux."""
    cpu = Path("/proc/cpuinfo").read_text("utf-8").partition("model name\t: ")[2].partition("\n")[0]
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


_MACHINE = _machine()  # before a benchmark pins itself to a core


def keep(name: str, **found: Any) -> None:
    """Writes what was found to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": _MACHINE, **found}, indent=2) + "\n")
