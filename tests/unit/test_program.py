"""What both commands share: version, help, completion, and a model of the user's own."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from npu_server.__main__ import PROGRAM as SERVER
from npu_server.config import ServeSettings
from npu_wire.program import Program
from npu_wire.settings import load_settings
from trainer_client.commands.cli import PROGRAM as TRAINER
from trainer_client.commands.config import CompareSettings

BOTH = pytest.mark.parametrize("program", [SERVER, TRAINER], ids=lambda program: program.name)


@BOTH
def test_version(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the installed distribution."""
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{program.name} {version('npu-in-the-loop')}\n"


@BOTH
def test_version_of_a_folder_that_is_not_installed(
    program: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known, which is said, with what to do: nothing to install is on the path."""
    monkeypatch.setattr(sys, "path", [])
    assert program.main(["--version"]) == 0
    answer = capsys.readouterr().out
    assert answer.startswith(f"{program.name} of a source tree that is not installed")
    assert "pip install" in answer


@BOTH
def test_every_command_has_help_without_python_in_it(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is in the list of commands; in its own help no type of Python's and no None."""
    assert program.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name in program.commands:
        assert f"\n  {name} " in listed
        with pytest.raises(SystemExit) as end:
            program.main([*name.split(), "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert not re.search(r"--[\w-]+ (str|int|float|bool|Path|dict)|default: (None|False|\{)", text)


def test_flags_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """Under the title of what they are about, with the unit of their value."""
    with pytest.raises(SystemExit):
        load_settings(ServeSettings, ["--help"], "npu-server serve")
    text = capsys.readouterr().out
    group = text[text.index("how long it waits:") : text.index("the process:")]
    assert "--lease-s SECONDS" in group
    assert "(default: 60.0)" in group
    assert "--backend" not in group


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files set variables that nobody has given to nothing."""
    monkeypatch.setenv("NPU_PROFILE", "")
    assert load_settings(ServeSettings, [], "npu-server serve").profile == "tflm"


def test_an_option_without_a_value_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Key without equals sign."""
    with pytest.raises(SystemExit):
        load_settings(ServeSettings, ["--backend-option", "a"], "npu-server serve")
    assert "--backend-option a: write KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["npu-server", "se"], ["serve"]),
        (["npu-server", "serve", "--listen", "x", "--tls-c"], ["--tls-cert", "--tls-client-ca"]),
        (["npu-server", "profiles", "sh"], ["show"]),
        (["npu-trainer", "train", "--see"], ["--seed"]),
        (["npu-trainer", "compare", "--see"], ["--seeds"]),
    ],
)
def test_completion(words: list[str], offered: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Bash itself completes the last word, by the script that the program prints."""
    program = SERVER if words[0] == SERVER.name else TRAINER
    assert program.main(["completion"]) == 0
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _{words[0].replace('-', '_')}"
    script = capsys.readouterr().out + f'\n{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


def test_profiles_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Only JSON is on standard output: names, and what one of them says."""
    assert SERVER.main(["profiles", "--json"]) == 0
    assert "tflm" in json.loads(capsys.readouterr().out)
    assert SERVER.main(["profiles", "show", "acc16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"]["accumulator.bits"]["value"] == "16"


def test_one_default_profile() -> None:
    """The server's: the client sends none, compose sets none, and the examination takes the same."""
    compose = (Path(__file__).parents[2] / "docker-compose.yml").read_text()
    assert load_settings(CompareSettings, [], "npu-trainer compare").profile is None
    assert "NPU_PROFILE: ${NPU_PROFILE:-${NPU_PROFILE_FILE:+/profile.toml}}\n" in compose
    assert load_settings(ServeSettings, [], "npu-server serve").profile == "tflm"


OWN = """
import torch
from torch import nn
from trainer_client.commands.data import Dataset

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))

def data():
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    return Dataset("halves", x, y, x, y)
"""


@pytest.mark.slow
def test_a_model_in_the_working_directory(tmp_path: Path) -> None:
    """The console script trains it; progress is lines on standard error, standard output is JSON alone."""
    (tmp_path / "mine.py").write_text(OWN)
    command = [str(Path(sys.executable).with_name("npu-trainer")), "train", "--json"]
    command += ["--model", "mine:net", "--dataset", "mine:data", "--fp32-steps", "20", "--qat-steps", "10"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NPU_")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["profile"] == "tflm"
    assert "FP32: step 2 of 20, loss " in done.stderr
    assert "NPU in the loop, tflm: step 10 of 10, loss " in done.stderr
    assert (tmp_path / "runs" / "train" / "weights.safetensors").is_file()
