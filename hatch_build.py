"""Build hook: a wheel, or the tree of an editable install, gets native kernels if there is a compiler."""

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "npu_server/backends/emulator/native"


class NativeKernels(BuildHookInterface):
    """Compiles them; without a compiler the wheel is one for every platform, and torch computes."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds in place, before the files are collected."""
        native = runpy.run_path(str(Path(self.root, FOLDER, "build.py")))
        try:
            library = native["build"]()
        except native["NoCompiler"] as reason:
            self.app.display_warning(f"native kernels are left out, torch will compute instead: {reason}")
            return
        build_data["artifacts"].append(f"/{FOLDER}/{library.name}")
        build_data["pure_python"] = False
        # One binary for every Python: it knows nothing of Python.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
