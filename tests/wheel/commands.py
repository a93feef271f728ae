"""What each command must say, by what is installed. The standard library only: clean environments run it."""

import os
import subprocess
from pathlib import Path

_TINY = ["--fp32-steps", "5", "--qat-steps", "2", "--calibration-images", "64", "--out", "{folder}/out"]
COMMANDS = {
    "serve": ["npu-server", "serve", "--listen", "unix:{folder}/npu.sock", "--http", "off"],
    "describe": ["npu-server", "describe", "--endpoint", "unix:{folder}/nobody.sock", "--timeout-s", "0.2"],
    "profiles": ["npu-server", "profiles"],
    "conformance": ["npu-server", "conformance", "--backend", "emulator"],
    "demo": ["npu-trainer", "demo", "--seeds", "1", *_TINY],
    "compare": ["npu-trainer", "compare", "--seeds", "1", *_TINY],
    "train": ["npu-trainer", "train", *_TINY],
    "report": ["npu-trainer", "report", "{folder}"],
    "version": ["npu-trainer", "--version"],
    "import": ["python", "-c", "import trainer_client"],
    "prepare": ["python", "-c", "import trainer_client; trainer_client.prepare"],
    "connect": ["python", "-c", "import trainer_client; trainer_client.connect().close()"],
}
WORKS = ""
ANSWERS = {
    "": {
        **dict.fromkeys(("serve", "profiles", "conformance", "connect"), "server"),
        **dict.fromkeys(("demo", "compare", "train", "report", "prepare"), "trainer"),
        **dict.fromkeys(("describe", "version", "import"), WORKS),
    },
    "trainer": {
        **dict.fromkeys(("serve", "conformance", "connect", "demo", "compare", "train"), "server"),
        **dict.fromkeys(("profiles", "describe", "report", "version", "import", "prepare"), WORKS),
    },
    "server": {
        **dict.fromkeys(("demo", "compare", "train", "report", "prepare"), "trainer"),
        **dict.fromkeys(("describe", "profiles", "conformance", "version", "import", "connect"), WORKS),
    },
    "server,trainer": dict.fromkeys(COMMANDS.keys() - {"serve"}, WORKS),  # `connect` starts one
}
"""Installed extras (none: the bare wheel) -> command -> the extra that it asks for."""

# How a command that works ends where it cannot do what was asked.
_OTHER_ENDS = {"describe": (1, "nobody.sock"), "report": (1, "give the folder that")}


def run(command: str, binaries: Path, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and standard error of a command in an empty folder."""
    program, *rest = (part.format(folder=folder) for part in COMMANDS[command])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NPU_", "PYTHON"))}
    done = subprocess.run(
        [str(binaries / program), *rest],
        env=inherited | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return done.returncode, done.stderr


def fault(command: str, missing: str, status: int, errors: str) -> str:
    """What is wrong with an answer; nothing: the empty string."""
    if not missing:
        wanted, words = _OTHER_ENDS.get(command, (0, ""))
        right = status == wanted and words in errors and "Traceback" not in errors
        return "" if right else f"exit status {status}, {errors}"
    line = f"not installed: pip install 'npu-in-the-loop[{missing}]'"
    if COMMANDS[command][0] == "python":  # an exception is what Python code gets
        return "" if errors.strip().endswith(line) and "MissingPackage: " in errors else errors
    right = status == 2 and errors.endswith(line + "\n") and errors.count("\n") == 1
    return "" if right else f"exit status {status}, {errors}"
