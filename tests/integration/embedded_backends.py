"""Fake backends for servers in processes of their own; each does what a server must survive, or cannot.

They write what they do to the file that the environment variable `FAKE_DIARY` names.
"""

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from fake_backend import FakeBackend, FakeProgram

from npu_server.seam import LayerTensor, Program, Ranges
from npu_wire.layer_map import Array

DEADLY_CODE = 99


def diary() -> list[str]:
    """What the backends have written."""
    path = Path(os.environ["FAKE_DIARY"])
    return path.read_text().splitlines() if path.exists() else []


class Diarist(FakeBackend):
    """Notes every call in the diary."""

    def note(self, call: str) -> None:
        super().note(call)
        if "FAKE_DIARY" in os.environ:
            with open(os.environ["FAKE_DIARY"], "a") as file:
                file.write(call + "\n")


class Deadly(Diarist):
    """Kills its process on a batch that begins with `DEADLY_CODE`."""

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        super().compile(model, ranges)
        return DeadlyProgram(self)


class DeadlyProgram(FakeProgram):
    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        if inputs["t0"].flat[0] == DEADLY_CODE:
            self.backend.note("died")
            os._exit(9)
        return super().forward(inputs, taps)


class Chatty(Diarist):
    """Prints a megabyte to standard output and as much to standard error, with every batch."""

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        super().compile(model, ranges)
        return ChattyProgram(self)


class ChattyProgram(FakeProgram):
    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        for stream in (sys.stdout, sys.stderr):
            for _ in range(1024):
                stream.write("x" * 1023 + "\n")
            stream.flush()
        return super().forward(inputs, taps)
