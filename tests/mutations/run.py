"""Runs the killers on a copy of the tree with one mutant in it, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .killers import KILLERS
from .mutants import ROOT, Mutant

_COPIED = ("npu_server", "npu_wire", "trainer_client", "tests", "pyproject.toml")
_LEFT_OUT = shutil.ignore_patterns("*.safetensors", "*.csv", ".hypothesis", ".pytest_cache")
TIMEOUT_S = 400


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        outcome: "killed", "survived", "timeout", or "broken" (no test could run: the mutant says nothing).
        test: id of the first test that failed.
        error: type of its exception.
        detail: its first line; of a broken one the end of pytest's output.
        seconds: how long it took.
    """

    outcome: str
    test: str = ""
    error: str = ""
    detail: str = ""
    seconds: float = 0.0


def copy_tree(target: Path, source: Path = ROOT) -> None:
    """What the killers need, with compiled code, so that a mutant recompiles what it changes only."""
    for name in _COPIED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=_LEFT_OUT)
        else:
            shutil.copy2(source / name, target / name)


def examine(
    mutant: Mutant | None,
    pristine: Path,
    selects: Sequence[str] = tuple(killer.select for killer in KILLERS),
) -> Verdict:
    """Runs killers until one fails.

    Args:
        mutant: the change; None: the tree as it is, where nothing may fail.
        pristine: a copy of the tree.
        selects: tests, as pytest takes them.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder, "tree")
        if mutant is None:
            tree = pristine  # what it compiles serves all mutants
        else:
            copy_tree(tree, pristine)
            changed = tree / mutant.file
            changed.write_text(mutant.apply(changed.read_text("utf-8")), "utf-8")
        verdict = Path(folder, "verdict.json")
        environment = os.environ | {
            "PYTHONPATH": str(tree),
            "OMP_NUM_THREADS": "1",
            "MUTANT_FIRST": mutant.first if mutant else "",
            "MUTANT_VERDICT": str(verdict),
        }
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        command = [sys.executable, "-m", "pytest", "-p", "tests.mutations.witness", *options, *selects]
        try:
            done = subprocess.run(
                command,
                cwd=tree,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Verdict("timeout", seconds=time.monotonic() - started)
        seconds = time.monotonic() - started
        if done.returncode == 0:
            return Verdict("survived", seconds=seconds)
        if verdict.exists():
            failure = json.loads(verdict.read_text("utf-8"))
            return Verdict("killed", failure["test"], failure["error"], failure["message"], seconds)
        return Verdict("broken", detail=(done.stdout + done.stderr)[-1500:], seconds=seconds)
