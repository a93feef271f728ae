"""What the documentation shows is run; a block that is not run here names the step that does."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from npu_server.app import serve
from npu_server.config import ServeConfig
from npu_server.numerics.profile import load_profile
from npu_server.registry import create_backend
from npu_server.seam import BackendOptions

from .snippets import ROOT, Snippet, inline_commands, snippets

BIN = Path(sys.executable).parent
# Commands that are too long for a test, and the file whose text shows that they are run, or what runs them.
ELSEWHERE = {
    "make demo": (".ci/run", "timeout 900 make --no-print-directory demo"),
    "make test": (".ci/run", "make --no-print-directory test\n"),
    "make test-slow": (".ci/run", "make --no-print-directory test-slow"),
    "make test-wheel": ("Makefile", "-m tests.wheel"),
    "pip install -c constraints.txt '.[trainer]'": ("tests/wheel/commands.py", '    "trainer": {'),
    "pip install -c constraints.txt '.[server]'": ("tests/wheel/commands.py", '    "server": {'),
    "pip install -c constraints.txt '.[server,trainer]'": (
        "tests/wheel/commands.py",
        '    "server,trainer": ',
    ),
    "make lint": (".ci/run", "make --no-print-directory lint"),
    "make proto": (".ci/run", "make --no-print-directory proto"),
    "make install": ("Makefile", "test: install"),
    "make conformance": ("tests/judges/test_claims.py", "judge_claim("),
    "make fuzz-wire MINUTES=60 SEED=1": ("tests/fuzz_wire/test_fuzz_wire.py", '"tests.fuzz_wire"'),
    "make bench": ("Makefile", "benchmarks/training_step.py --write"),
    "make soak": ("tests/soak/test_soak.py", "from tests.soak.campaign import soak"),
    "make fuzz-wire": ("tests/fuzz_wire/test_fuzz_wire.py", '"tests.fuzz_wire"'),
    ".ci/run": (".ci/run", "#!/usr/bin/env bash"),
    "docker compose up": ("deploy/check-compose.sh", "compose up --build --wait"),
    "docker compose --profile trainer up": ("deploy/check-compose.sh", "compose --profile trainer run"),
    "NPU_BACKEND=reference docker compose up": (
        "deploy/check-compose.sh",
        "NPU_BACKEND=reference NPU_PROFILE_FILE=$work/my-npu.toml compose up",
    ),
}
# What a test adds to a command so that it ends soon.
SHORTER = {
    "npu-trainer compare": "--seeds 1 --fp32-steps 30 --qat-steps 2 --calibration-images 64 --out {folder}",
    "python benchmarks/emulator.py": "--size 32 --batch 2 --rounds 1 --networks MobileNetV2 --profiles tflm",
    "python benchmarks/training_step.py": "--size 32 --batch 2 --rounds 1 --no-memory",
    "python benchmarks/lean_accuracy.py": "--seeds 1 --fp32-steps 2 --qat-steps 1 --profiles tflm",
}


def test_every_block_is_of_a_kind_that_is_run() -> None:
    """No block without a language, and none in a language that nothing here runs."""
    assert {snippet.language for snippet in snippets()} <= {"sh", "python", "toml"}
    assert {str(each.document.name) for each in snippets()} >= {
        "README.md",
        "CONTRIBUTING.md",
        "performance.md",
    }


def test_what_is_run_elsewhere_is_run_there() -> None:
    """Every such command is in the documentation, and the file named runs it."""
    shown = {command for snippet in snippets("sh") for command in snippet.commands}
    assert ELSEWHERE.keys() <= shown
    for command, (file, text) in ELSEWHERE.items():
        assert text in (ROOT / file).read_text(), command


@pytest.fixture
def npu_host(tmp_path: Path) -> Iterator[str]:
    """The address of a server, for the one that the documentation makes up."""
    device = create_backend("emulator", BackendOptions(profile="acc16", threads=1))
    with serve(device, ServeConfig(listen=f"unix:{tmp_path}/npu.sock", http="off")) as server:
        yield server.address


def test_python(npu_host: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of each document, one after the other, with a small model of the reader's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    x = torch.randn(24, 1, 8, 8)
    with torch.no_grad():
        model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {
        "model": model,
        "example_inputs": x[:2],
        "loader": DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=8),
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }
    blocks = snippets("python")
    for document in {block.document for block in blocks}:
        namespace = dict(names)
        for block in blocks:
            if block.document == document:
                code = block.code.replace("npu-host:50051", npu_host)
                exec(compile("\n" * block.line + code, str(block.document), "exec"), namespace)
        namespace["npu"].close()
    assert re.search(r"^6 +linear( +-?[\d.]+){5}$", capsys.readouterr().out, re.MULTILINE)
    trained = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert trained == {"0.weight", "1.weight", "1.bias", "6.weight", "6.bias"}


@pytest.mark.parametrize("snippet", snippets("toml"), ids=str)
def test_toml(snippet: Snippet, tmp_path: Path) -> None:
    """A profile that is shown can be loaded, under the name that it gives itself."""
    path = tmp_path / "shown.toml"
    path.write_text(snippet.code)
    assert f'name = "{load_profile(str(path)).name}"' in snippet.code


@pytest.mark.slow
@pytest.mark.parametrize("snippet", snippets("sh"), ids=str)
def test_shell(snippet: Snippet, tmp_path: Path) -> None:
    """The commands of a block in turn, a server in the background; ports are free ones."""
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "200"}
    ports = {name: str(free_port()) for name in ("50051", "8080")}
    servers = []
    try:
        for command in snippet.commands:
            if command in ELSEWHERE:
                continue
            for shown, free in ports.items():
                command = command.replace(f":{shown}", f":{free}")
            for start, flags in SHORTER.items():
                if start in command:
                    command += " " + flags.format(folder=tmp_path)
            background = command.startswith("npu-server serve")
            process = subprocess.Popen(
                f"exec {command}" if background else command,
                shell=True,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            if background:
                servers.append(process)
                assert process.stdout is not None
                assert process.stdout.readline().startswith("listening on")
            else:
                said, errors = process.communicate(timeout=250)
                assert process.returncode == 0, f"{command}\n{said[-2000:]}\n{errors[-2000:]}"
    finally:
        for server in servers:
            server.terminate()
            server.communicate(timeout=60)


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples(example: Path) -> None:
    """Each example as it is, against its embedded server; training must have been worth it."""
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracies = [float(number) for number in re.findall(r"([\d.]+) %", done.stdout)]
    assert len(accuracies) == 3
    assert accuracies[2] > accuracies[1] - 2
    assert min(accuracies) > 80


def test_commands_in_running_text_exist() -> None:
    """Scripts, subcommands, make targets and flags that a sentence names."""
    makefile = (ROOT / "Makefile").read_text()
    helps: dict[tuple[str, str], str] = {}
    for command in inline_commands():
        program, first, *rest = command.split()
        if program == "make":
            assert re.search(rf"^{re.escape(first)}:", makefile, re.MULTILINE), command
        elif program in ("python", "pytest"):
            script = first if not first.startswith("-") else rest[0].replace(".", "/")
            assert (ROOT / script).exists(), command
        elif not first.startswith("-"):
            key = (program, first)
            if key not in helps:
                shown = subprocess.run(
                    [BIN / program, first, "--help"], capture_output=True, text=True, check=False
                )
                helps[key] = shown.stdout if shown.returncode == 0 else ""
            assert helps[key], command
            for flag in (part.split("=")[0] for part in rest if part.startswith("--")):
                assert f"{flag} " in helps[key].replace(",", " "), command


def test_the_readme_counts_what_the_matrix_counts() -> None:
    """Outputs compared, in millions, are those of the page that `make conformance` writes."""
    page = (ROOT / "docs" / "conformance-matrix.md").read_text()
    counted = re.search(r"\*\*([\d,]{9,}) ", page)
    quoted = re.search(r"has ([\d,]+)\s+million outputs compared", (ROOT / "README.md").read_text())
    assert counted is not None
    assert quoted is not None
    assert int(quoted[1].replace(",", "")) == int(counted[1].replace(",", "")) // 10**6
