import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = Path(sys.executable).with_name("npu-trainer")
TINY = ["--fp32-steps", "30", "--qat-steps", "2", "--seeds", "1", "--calibration-images", "64"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A temporary folder of our own, in which an embedded server that is left behind would show."""
    (tmp_path / "tmp").mkdir()
    settings = {name: value for name, value in os.environ.items() if not name.startswith("NPU_")}
    return settings | {"TMPDIR": str(tmp_path / "tmp"), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}


def servers_left(folder: Path) -> list[str]:
    """Command lines of processes that mention a folder."""
    lines = [path.read_bytes().decode() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [line for line in lines if str(folder) in line]


@pytest.mark.slow
def test_demo_survives_ctrl_c_and_ends_with_table_and_report(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Interrupted after its first PTQ number, the demo keeps it, stops its servers, and a rerun finishes."""
    command = [str(TRAINER), "demo", *TINY, "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "min-max PTQ" in line:
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command to go on" in errors
    assert servers_left(tmp_path / "tmp") == []
    kept = list((tmp_path / "run" / "cells").glob("*.json"))
    assert len(kept) >= 2
    written = [path.stat().st_mtime_ns for path in kept]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in kept] == written
    assert servers_left(tmp_path / "tmp") == []
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [npu["fingerprint"]["profile"] for npu in document["npus"]] == ["pow2-trunc", "acc16"]
    assert len(document["cells"]) == 7
    table = [line for line in done.stdout.splitlines() if line.startswith("│ NPU in the loop")]
    ours = {c["profile"]: c["accuracy"] for c in document["cells"] if c["method"] == "npu"}
    assert len(table) == 1
    assert f"{ours['pow2-trunc']:.1f}" in table[0]
    assert f"{ours['acc16']:.1f}" in table[0]
    assert str(tmp_path / "run" / "report.html") in done.stdout
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["compare", "--dataset", "mnist"], 1, "choose digits, fashion-mnist or your own"),
        (["compare", "--model", "resnet"], 1, "choose mobilenet-v1-small"),
        (["compare", "--seeds", "0"], 2, "--seeds: Input should be greater than or equal to 1"),
        (["train", "--config", "nowhere.toml"], 1, "--config nowhere.toml: no such file"),
        (["report", "nowhere"], 1, "give the folder that `npu-trainer compare --out` wrote"),
        (["fly"], 2, "unknown command 'fly'"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], status: int, message: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A mistake of the user's ends with a sentence and an exit status, never a traceback."""
    done = subprocess.run(
        [str(TRAINER), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
