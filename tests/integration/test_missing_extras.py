"""With an extra missing, each command works or names the line that installs it."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from npu_wire.extras import PACKAGES

HIDE = """
import sys
from importlib.machinery import PathFinder
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hidden
"""
SERVER = ["-m", "npu_server"]
TRAINER = ["-m", "trainer_client.commands.cli"]
COMMANDS = {
    "serve": [*SERVER, "serve", "--listen", "unix:{folder}/npu.sock", "--http", "off"],
    "describe": [*SERVER, "describe", "--endpoint", "unix:{folder}/nobody.sock", "--timeout-s", "0.2"],
    "profiles": [*SERVER, "profiles"],
    "conformance": [*SERVER, "conformance", "--backend", "reference"],
    "demo": [*TRAINER, "demo", "--out", "{folder}/out"],
    "compare": [*TRAINER, "compare", "--out", "{folder}/out"],
    "train": [*TRAINER, "train", "--out", "{folder}/out"],
    "report": [*TRAINER, "report", "{folder}"],
    "import": ["-c", "import trainer_client"],
    "prepare": ["-c", "import trainer_client; trainer_client.prepare"],
    "connect": ["-c", "import trainer_client; trainer_client.connect()"],
}
WORKS = ""
# Installed extra (none: the bare wheel) -> command -> the extra that it asks for.
ANSWERS = {
    "": {
        **dict.fromkeys(("serve", "profiles", "conformance", "connect"), "server"),
        **dict.fromkeys(("demo", "compare", "train", "report", "prepare"), "trainer"),
        **dict.fromkeys(("describe", "import"), WORKS),
    },
    "trainer": {
        **dict.fromkeys(("serve", "conformance", "connect", "demo", "train"), "server"),
        **dict.fromkeys(("profiles", "import", "prepare"), WORKS),
    },
    "server": {
        **dict.fromkeys(("demo", "train", "prepare"), "trainer"),
        **dict.fromkeys(("profiles", "connect"), WORKS),
    },
}
# They import torch: several seconds together.
SLOW = {"trainer": ("demo", "train", "prepare"), "server": ("demo", "train", "prepare", "connect")}
# What a command that works says where it cannot do what was asked.
OTHER_ENDS = {"describe": (1, "nobody.sock")}


def test_the_table_of_packages_is_that_of_the_distribution() -> None:
    """Each extra brings exactly the packages by whose absence it is known."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for extra, packages in PACKAGES.items():
        wanted = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"][extra]}
        installed = packages_distributions()
        assert {installed[package][0].replace("_", "-") for package in packages} == wanted


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        pytest.param(extra, command, marks=[pytest.mark.slow] if command in SLOW.get(extra, ()) else [])
        for extra, answers in ANSWERS.items()
        for command in answers
    ],
)
def test_a_missing_extra_is_named(extra: str, command: str, tmp_path: Path) -> None:
    """Its install line and exit status 2, or what the command does; never a traceback."""
    hidden = frozenset().union(*PACKAGES.values()) - PACKAGES.get(extra, frozenset())  # type: ignore[call-overload]
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=set(hidden)))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NPU_")}
    done = subprocess.run(
        [sys.executable, *(part.format(folder=tmp_path) for part in COMMANDS[command])],
        env=environment | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    missing = ANSWERS[extra][command]
    if missing:
        last = done.stderr.strip().splitlines()[-1]
        assert last.endswith(f"not installed: pip install 'npu-in-the-loop[{missing}]'")
        if COMMANDS[command][0] == "-m":
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    else:
        status, words = OTHER_ENDS.get(command, (0, ""))
        assert done.returncode == status, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
