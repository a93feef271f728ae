"""The built wheel in four clean environments: `python -m tests.wheel` (wants pip and venv)."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.wheel.commands import ANSWERS, fault, run

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Builds, installs, asks, prints a table; exit status 1 if an answer is wrong."""
    faults = 0
    with tempfile.TemporaryDirectory(prefix="npu-wheel-") as name:
        folder = Path(name)
        _pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
        (wheel,) = folder.glob("*.whl")
        print("| installed | seconds | MB | " + " | ".join(ANSWERS[""]) + " |")
        print("|---" * (3 + len(ANSWERS[""])) + "|", flush=True)
        for extras, answers in ANSWERS.items():
            venv, start = folder / "venv", time.monotonic()
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
            what = f"{wheel}[{extras}]" if extras else str(wheel)
            _pip(str(venv / "bin" / "python"), "install", "-c", str(ROOT / "constraints.txt"), what)
            seconds = time.monotonic() - start
            row = {}
            for command, missing in answers.items():
                empty = folder / f"{command}-{extras}"
                empty.mkdir()
                wrong = fault(command, missing, *run(command, venv / "bin", empty, {}))
                faults += bool(wrong)
                row[command] = "WRONG" if wrong else f"[{missing}]" if missing else "works"
                if wrong:
                    print(f"{command} with [{extras}]: {wrong}", file=sys.stderr)
            cells = [extras or "bare", f"{seconds:.0f}", str(_megabytes(venv))]
            cells += [row.get(command, "-") for command in ANSWERS[""]]
            print("| " + " | ".join(cells) + " |", flush=True)
    return 1 if faults else 0


def _pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def _megabytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 10**6


if __name__ == "__main__":
    sys.exit(main())
