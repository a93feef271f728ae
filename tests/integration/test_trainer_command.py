"""The command `npu-trainer`, as far as it comes without training."""

from pathlib import Path

import pytest
from fake_backend import Start

from trainer_client.commands.cli import main

TRAIN = ["train", "--model", "mobilenet-v1-small", "--fp32-steps", "1"]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPU_DEBUG", "NPU_ENDPOINT", "NPU_PROFILE", "NPU_CONFIG", "NPU_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


_ONE_WORD = "must be one word of printable ASCII characters; it"
WRONG = {
    "--profile acc16": "profile: such settings choose an embedded server",
    "--backend reference": "backend: such settings choose an embedded server",
    "--token-file {folder}/nothing": "cannot read the token file '{folder}/nothing': No such file",
    "--token-file {folder}/empty": "token file '{folder}/empty' " + _ONE_WORD + " is empty",
    "--token-file {folder}/lines": "token file '{folder}/lines' " + _ONE_WORD + " has a line break",
    "--token-file {folder}": "cannot read the token file '{folder}': Is a directory",
}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("flags", WRONG)
def test_wrong_settings_are_errors(
    flags: str, command: str, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What would be ignored beside an endpoint, and files that hold no token: status 1 and one line."""
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "lines").write_text("a\nb\n")
    arguments = [command, "--endpoint", start().address, *flags.format(folder=tmp_path).split()]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " + WRONG[flags].format(folder=tmp_path))


DEBUG = {
    "NPU_DEBUG=0": False,
    "NPU_DEBUG=false": False,
    "NPU_DEBUG=1": True,
    "--debug": True,
    "--no-debug": False,
}


@pytest.mark.parametrize("setting", DEBUG)
def test_debug_is_what_its_value_says(
    setting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback where it is on, a line where it is off."""
    flags = [setting] if setting.startswith("--") else []
    if not flags:
        monkeypatch.setenv(*setting.split("="))
    assert main(["train", "--endpoint", "nonsense", *flags]) == 1
    assert ("Traceback" in capsys.readouterr().err) == DEBUG[setting]
