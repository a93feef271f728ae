"""Speed of layer tensors from a server process to its client, by each way that there is.

    python benchmarks/transport.py [--rounds 9] [--mb 64] [--write]

A device that computes nothing answers a batch with so many MB of layer tensors. Time runs from submitting the
batch until the last tensor can be read. In every round each way takes one batch in turn; medians are printed,
with the ratio to a raw socket: a process that sends the same bytes to one that receives them into memory that
it has, which no message format does. `--write` keeps the numbers in benchmarks/results/transport.json.
"""

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from keeping import keep

from npu_server.app import serve
from npu_server.config import ServeConfig
from npu_server.seam import BackendOptions, Health, LayerTensor
from npu_wire.device import Capabilities, Fingerprint
from npu_wire.layer_map import Array, Float32Array, LayerMap, LayerSpec, TensorSpec
from trainer_client.npu.connection import Connection, connect

SIZES_MB = (0.25, 1.0, 4.0, 16.0)
INPUT = np.zeros((1, 1), np.int8)


class Source:
    """A device whose layers are there already."""

    def __init__(self, options: BackendOptions) -> None:
        pass

    def open(self) -> Capabilities:
        """Takes hold of nothing."""
        return Capabilities(Fingerprint("source", "nobody", "source", "1", "none", "0" * 64), ("Add",), 1)

    def close(self) -> None:
        """Frees nothing."""

    def probe(self) -> Health:
        """Is well."""
        return Health(ok=True)

    def compile(self, model: bytes, ranges: Mapping[str, tuple[float, float]]) -> "SourceProgram":
        """The "model" says how many layers of how many bytes."""
        layers, nbytes = map(int, model.split())
        return SourceProgram(layers, nbytes)


class SourceProgram:
    """Yields the same bytes for every layer."""

    def __init__(self, layers: int, nbytes: int) -> None:
        self._bytes = pattern(nbytes)
        specs = [TensorSpec("x", (1,), 1.0, 0)]
        specs += [TensorSpec(f"t{k}", (nbytes,), 1.0, 0) for k in range(layers)]
        made = tuple(LayerSpec(specs[k + 1], "Add", (specs[k].name,)) for k in range(layers))
        self.layer_map = LayerMap((specs[0],), made, (specs[-1].name,))
        self.parameters: Mapping[str, tuple[int, ...]] = {}

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """There are none."""

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        """Computes nothing."""
        for layer in range(len(self.layer_map.layers)):
            now = time.monotonic_ns()
            wanted = layer in taps or layer in self.layer_map.output_layers
            yield LayerTensor(layer, self._bytes, now, now) if wanted else None

    def close(self) -> None:
        """Frees nothing."""


def pattern(nbytes: int) -> Array:
    """The tensor that each layer yields, shape (1, nbytes)."""
    return np.arange(nbytes, dtype=np.uint32).astype(np.int8)[None]


def child(listen: str) -> None:
    """Serves until standard input closes: the product's wire, or, with `raw:` before the address, bytes."""
    if listen.startswith("raw:"):
        family, address = _address(listen.removeprefix("raw:"))
        with socket.socket(family) as listener:
            listener.bind(address)
            listener.listen()
            name = listener.getsockname()
            print(name if family == socket.AF_UNIX else f"{name[0]}:{name[1]}", flush=True)
            threading.Thread(target=_send_raw, args=(listener,), daemon=True).start()
            sys.stdin.read()
        return
    with serve(
        Source(BackendOptions()), ServeConfig.model_validate({"listen": listen, "http": "off"})
    ) as server:
        print(server.address, flush=True)
        sys.stdin.read()


def _send_raw(listener: socket.socket) -> None:
    peer, _ = listener.accept()
    while request := peer.recv(32):
        layers, nbytes = map(int, request.split())
        data = pattern(nbytes).data
        for _ in range(layers):
            peer.sendall(data)


def _address(text: str) -> tuple[int, Any]:
    if text.startswith("/"):
        return socket.AF_UNIX, text
    host, _, port = text.rpartition(":")
    return socket.AF_INET, (host, int(port))


Way = Callable[[int, int], float]
"""(layers, bytes of each) -> seconds."""


def over_the_wire(npu: Connection) -> Way:
    """The product's; the session for one size is kept, its first batch is not measured."""
    sessions: dict[tuple[int, int], Any] = {}

    def once(session: Any, layers: int, nbytes: int) -> float:
        begin = time.perf_counter()
        pending = session.submit({"x": INPUT}, range(layers))
        found = [pending.tensor(layer) for layer in range(layers)]
        seconds = time.perf_counter() - begin
        assert all(tensor[0, -1] == found[0][0, -1] for tensor in found)
        return seconds

    def way(layers: int, nbytes: int) -> float:
        if (layers, nbytes) not in sessions:
            sessions.clear()
            session = sessions[layers, nbytes] = npu.compile(
                f"{layers} {nbytes}".encode(), {"x": (-1.0, 1.0)}
            )
            for _ in range(2):
                once(session, layers, nbytes)
            right = session.submit({"x": INPUT}, ()).tensor(layers - 1)
            np.testing.assert_array_equal(pattern(nbytes), right)
        return once(sessions[layers, nbytes], layers, nbytes)

    return way


def raw(address: str) -> Way:
    """Bytes into memory that is there."""
    family, name = _address(address)
    peer = socket.socket(family)
    peer.connect(name)

    def way(layers: int, nbytes: int) -> float:
        memory = memoryview(bytearray(nbytes))
        begin = time.perf_counter()
        peer.send(f"{layers} {nbytes}".encode())
        for _ in range(layers):
            got = 0
            while got < nbytes:
                got += peer.recv_into(memory[got:])
        return time.perf_counter() - begin

    return way


@contextlib.contextmanager
def served(listen: str) -> Iterator[str]:
    """The address of a server process."""
    command = [sys.executable, __file__, "--serve", listen]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def main() -> None:
    """Prints a table of GB/s."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mb", type=int, default=64, help="of tensors, a batch")
    parser.add_argument("--write", action="store_true", help="to benchmarks/results")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        child(options.serve)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        tcp = stack.enter_context(served("127.0.0.1:0"))
        unix = stack.enter_context(served(f"unix:{folder}/npu.sock"))
        ways = {
            "tcp": over_the_wire(stack.enter_context(connect(tcp, shared_memory=False))),
            "unix socket": over_the_wire(stack.enter_context(connect(unix, shared_memory=False))),
            "shared memory": over_the_wire(stack.enter_context(connect(unix))),
            "raw tcp": raw(stack.enter_context(served("raw:127.0.0.1:0"))),
            "raw unix socket": raw(stack.enter_context(served(f"raw:{folder}/raw.sock"))),
        }
        table: dict[str, dict[str, float]] = {way: {} for way in ways}
        for size in SIZES_MB:
            nbytes = int(size * 2**20)
            layers = max(1, int(options.mb / size))
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for way in ways.values():
                way(layers, nbytes)
            for _ in range(options.rounds):
                for name, way in ways.items():
                    seconds[name].append(way(layers, nbytes))
            for name, taken in seconds.items():
                table[name][f"{size:g} MB"] = layers * nbytes / statistics.median(taken) / 1e9
    report(table, options.write)


def report(table: Mapping[str, Mapping[str, float]], write: bool) -> None:
    """Prints it, and keeps it."""
    peers = {"tcp": "raw tcp", "unix socket": "raw unix socket", "shared memory": "raw unix socket"}
    print("GB/s, and the ratio to the raw socket\n" + " " * 16, *(f"{f'{s:g} MB':>14}" for s in SIZES_MB))
    for way, row in table.items():
        cells = [f"{v:6.2f} ({v / table[peers.get(way, way)][size]:5.2f})" for size, v in row.items()]
        print(f"{way:16}", *(f"{cell:>14}" for cell in cells))
    if write:
        keep("transport", gb_per_s=table)


if __name__ == "__main__":
    main()
