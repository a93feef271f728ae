"""The server of the soak, a process of its own: `python -m tests.soak.device ADDRESS`.

Its device adds the number of the layer to every code. It answers each line that it reads with what it holds.
"""

import gc
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from npu_server.app import serve
from npu_server.config import ServeConfig
from npu_server.seam import BackendOptions, Health, LayerTensor
from npu_wire.device import Capabilities, Fingerprint
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap, LayerSpec, TensorSpec

LAYERS, SHAPE = 4, (3, 80, 80)


def expected(codes: Int8Array, layer: int) -> Int8Array:
    """Layer k adds k + 1, wrapping."""
    return codes + np.int8(layer + 1)


class Adder:
    """The device and its program in one."""

    def __init__(self, options: BackendOptions) -> None:
        specs = [TensorSpec(name, SHAPE, 1.0, 0) for name in ("x", *(f"t{k}" for k in range(LAYERS)))]
        layers = tuple(LayerSpec(spec, "Add", ("x",)) for spec in specs[1:])
        self.layer_map = LayerMap((specs[0],), layers, (specs[-1].name,))
        self.parameters: Mapping[str, tuple[int, ...]] = {}

    def open(self) -> Capabilities:
        """Takes hold of nothing."""
        return Capabilities(Fingerprint("adder", "nobody", "adder", "1", "none", "0" * 64), ("Add",), 8)

    def close(self) -> None:
        """Frees nothing."""

    def probe(self) -> Health:
        """Is well."""
        return Health(ok=True)

    def compile(self, model: bytes, ranges: Mapping[str, tuple[float, float]]) -> "Adder":
        """Any model."""
        return self

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """There are none."""

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        """Every layer."""
        for layer in range(LAYERS):
            now = time.monotonic_ns()
            yield LayerTensor(layer, expected(inputs["x"], layer), now, now)


def main() -> None:
    """Serves until standard input closes."""
    settings = {"listen": sys.argv[1], "http": "off", "max_shared_bytes": 2**22, "lease_s": 1.0}
    with serve(Adder(BackendOptions()), ServeConfig.model_validate(settings)) as server:
        print("serving", flush=True)
        for _ in sys.stdin:
            gc.collect()
            maps = Path("/proc/self/maps").read_text().count("memfd:npu-tensors")
            threads, files = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("task", "fd"))
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            held = server.sessions.held_bytes()
            sessions, committed = server.sessions.count(), server.rendezvous.committed
            print(sessions, committed, held, maps, threads, files, memory, flush=True)


if __name__ == "__main__":
    main()
