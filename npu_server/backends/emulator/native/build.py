"""Compiles kernels.cpp beside itself: `python npu_server/backends/emulator/native/build.py`.

The standard library only: the wheel's build hook runs it too, where nothing is installed.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE, LIBRARY = HERE / "kernels.cpp", HERE / "kernels.so"
LEVELS: dict[str, tuple[str, ...]] = {
    "avx512_vnni": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    "avx2": ("-mavx2",),
    "baseline": (),
}
"""Instruction sets -> flags, the fastest first. "baseline" is what every CPU of the architecture has."""

# A fused multiply-add rounds once where the specification rounds twice. Nobody looks at errno or at traps,
# which would keep the compiler from making vectors.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


class NoCompiler(Exception):
    """There is none, or it fails; the message says which."""


def levels() -> tuple[str, ...]:
    """Those of this architecture."""
    return tuple(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ("baseline",)


def digest() -> str:
    """Of all that the library is made of: one that was made of something else is not to be used."""
    return hashlib.sha256(SOURCE.read_bytes() + repr((LEVELS, _FLAGS)).encode()).hexdigest()


def build() -> Path:
    """Compiles and links the library.

    Raises:
        NoCompiler: the system has no C++ compiler that does it.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise NoCompiler("no C++ compiler (g++, clang++, $CXX)")
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{level}.o")) for level in levels()]
        made = Path(folder, LIBRARY.name)
        for level, target in zip(levels(), objects, strict=True):
            name = [f"-DLEVEL={level}"]
            if level == "baseline":
                name.append(f'-DDIGEST="{digest()}"')
            _run(compiler, *_FLAGS, *LEVELS[level], *name, "-c", str(SOURCE), "-o", target)
        _run(compiler, "-shared", "-static-libstdc++", "-static-libgcc", *objects, "-o", str(made))
        # Whoever has the old one open keeps it.
        fresh = LIBRARY.with_suffix(".new")
        shutil.copyfile(made, fresh)
        fresh.replace(LIBRARY)
    return LIBRARY


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoCompiler(f"{command[0]}: {error}") from None
    if done.returncode:
        raise NoCompiler(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    try:
        print(f"native kernels: {build()} for {', '.join(levels())}")
    except NoCompiler as reason:
        sys.exit(f"no native kernels: {reason}")
