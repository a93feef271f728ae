"""A compiler in a child process that may take only so much memory, and is killed when it takes too long.

Frames on its standard input and output: a length of 8 bytes, then as many bytes of JSON or model.
"""

import json
import os
import resource
import select
import struct
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MEMORY_BYTES = 2 * 2**30
"""Of address space beyond what the imports take."""
TIMEOUT_S = 20.0
"""Far more than any answer takes; only a hang gets there."""


@dataclass(frozen=True)
class Answer:
    """What the compiler said.

    Attributes:
        kind: "compiled", the class of an `NpuError`, or "defect".
        detail: the error's message, or a traceback.
    """

    kind: str
    detail: str


class LimitedCompiler:
    """The child process; starts again after a defect. A context manager."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "LimitedCompiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def compile(self, model: bytes, ranges: dict[str, tuple[float, float]]) -> Answer:
        """Compiles in the child, and runs one batch of what compiles."""
        if self._child is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        _send(child.stdin, json.dumps(ranges).encode())
        _send(child.stdin, model)
        if not select.select([child.stdout], [], [], TIMEOUT_S)[0]:
            self._stop()
            return Answer("defect", f"no answer within {TIMEOUT_S:g} s")
        answer = _receive(child.stdout)
        if answer is None:
            status = child.wait()
            self._stop()
            return Answer("defect", f"the process died with status {status}")
        return Answer(**json.loads(answer))

    def _stop(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what the dead child has not read
                continue
        self._child = None


def _send(pipe: BinaryIO, frame: bytes) -> None:
    pipe.write(struct.pack("<Q", len(frame)) + frame)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes | None:
    head = pipe.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    return pipe.read(size)


def main() -> None:
    """Serves until standard input ends."""
    import numpy as np

    from npu_server.backends.reference import ReferenceBackend
    from npu_server.seam import BackendOptions
    from npu_wire.errors import NpuError
    from npu_wire.tensors import input_header

    def work(model: bytes, ranges: dict[str, tuple[float, float]]) -> Answer:
        try:
            program = backend.compile(model, ranges)
            layer_map = program.layer_map
            headers = [input_header(spec, 1) for spec in layer_map.inputs]
            sizes = [spec.shape for spec in layer_map.tensors.values()] + [header.shape for header in headers]
            if sum(int(np.prod(shape, dtype=object)) for shape in sizes) < 10**6:
                inputs = {header.name: np.ones(header.shape, header.dtype) for header in headers}
                for _ in program.forward(inputs, range(len(layer_map.layers))):
                    pass
        except NpuError as error:
            return Answer(type(error).__name__, str(error))
        except BaseException:
            return Answer("defect", traceback.format_exc())
        return Answer("compiled", "")

    backend = ReferenceBackend(BackendOptions(profile="tflm"))
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    while (ranges := _receive(sys.stdin.buffer)) is not None:
        model = _receive(sys.stdin.buffer)
        assert model is not None
        answer = work(model, {name: tuple(pair) for name, pair in json.loads(ranges).items()})
        _send(answers, json.dumps({"kind": answer.kind, "detail": answer.detail[-4000:]}).encode())


if __name__ == "__main__":
    main()
