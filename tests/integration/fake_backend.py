"""A backend whose arithmetic can be done by hand: layer k adds k + 1 and the weight "bias" to every code."""

import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from npu_server.app import RunningServer
from npu_server.seam import BackendOptions, Health, LayerTensor, Program, Ranges
from npu_wire.device import Capabilities, Fingerprint
from npu_wire.errors import InvalidInput, InvalidModel, NpuError, UnsupportedModel
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap, LayerSpec, MemoryLayout, TensorSpec

Start = Callable[..., RunningServer]
"""Type of the fixture `start`."""

Spawn = Callable[..., "subprocess.Popen[str]"]
"""Type of the fixture `spawn`."""

LAYERS = 3
MAX_BATCH = 64


def expected(batch: Int8Array, layer: int, bias: int = 0) -> Int8Array:
    """Output of a layer: 1 + 2 + ... + (layer + 1) and (layer + 1) * bias more than the input, wrapping."""
    added = sum(range(1, layer + 2)) + (layer + 1) * bias
    return (batch.astype(np.int64) + added).astype(np.int8)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits for what no event tells."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "this does not come true"
        time.sleep(0.01)


class FakeBackend:
    """Counts what is called; `gate` holds every layer back while it is clear.

    Args:
        options: `extra["size"]`: edge of the (2, size, size) input; `extra["hash"]`: profile hash;
            `extra["gate"]`: path; layers from 1 on wait until that file exists;
            `extra["log"]`: path of a file that gets what is called, a line each.
    """

    def __init__(self, options: BackendOptions) -> None:
        size = int(options.extra.get("size", "4"))
        self.profile_hash = options.extra.get("hash", "0" * 64)
        self.gate_file = options.extra.get("gate", "")
        self.log_file = options.extra.get("log", "")
        self.shape = (2, size, size)
        self.gate = threading.Event()
        self.gate.set()
        self.layer_began = threading.Semaphore(0)
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.health = Health(ok=True)
        self.fail_with: Exception | None = None
        self.refuse_weights: NpuError | None = None
        self.before_layer: Callable[[int], object] = lambda layer: None
        self.spoil: Callable[[LayerTensor], LayerTensor] = lambda tensor: tensor

    def open(self) -> Capabilities:
        self.note("open")
        mark = Fingerprint("fake", "nobody", "adder", "1", "plus-one", self.profile_hash)
        return Capabilities(mark, ("Add",), MAX_BATCH)

    def close(self) -> None:
        self.note("close")

    def probe(self) -> Health:
        self.threads.add(threading.get_ident())
        return self.health

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        self.calls.append("compile")  # from any thread
        if model == b"unreadable":
            raise InvalidModel("these bytes are no model")
        if model == b"unsupported":
            raise UnsupportedModel("node 'n' (Frobnicate): the adder cannot frobnicate")
        if model == b"crash":
            raise ZeroDivisionError("secret detail")
        return FakeProgram(self)

    def note(self, call: str) -> None:
        self.calls.append(call)
        if self.log_file:
            with open(self.log_file, "a") as log_file:
                print(call, file=log_file)
        self.threads.add(threading.get_ident())


class FakeProgram:
    def __init__(self, backend: FakeBackend) -> None:
        self.backend = backend
        self.bias = 0
        specs = [
            TensorSpec(f"t{k}", backend.shape, 0.5, k, MemoryLayout.CHANNELS_LAST) for k in range(LAYERS + 1)
        ]
        layers = tuple(
            LayerSpec(specs[k + 1], "Add", (f"t{k}",), parameters=("bias",)) for k in range(LAYERS)
        )
        self._map = LayerMap((TensorSpec("t0", backend.shape, 0.5, 0),), layers, (layers[-1].name,))

    @property
    def layer_map(self) -> LayerMap:
        return self._map

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        return {"bias": (), "big": (3, 1000, 1000)}

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        self.backend.note("load_weights")
        if self.backend.refuse_weights is not None:
            raise self.backend.refuse_weights
        if abs(tensors.get("bias", 0)) > 127:
            raise InvalidInput("the bias is out of range")
        if "bias" in tensors:
            self.bias = int(tensors["bias"].item())

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        self.backend.note("forward")
        for layer in range(LAYERS):
            start = time.monotonic_ns()
            self.backend.note(f"layer {layer}")
            self.backend.layer_began.release()
            self.backend.before_layer(layer)
            self.backend.gate.wait()
            while layer and self.backend.gate_file and not _exists(self.backend.gate_file):
                time.sleep(0.005)  # runs in another process, so there is no event to wait for
            if self.backend.fail_with is not None:
                raise self.backend.fail_with
            if layer in taps or layer in self._map.output_layers:
                channels_last = np.ascontiguousarray(
                    np.moveaxis(expected(inputs["t0"], layer, self.bias), 1, -1)
                )
                yield self.backend.spoil(
                    LayerTensor(layer, np.moveaxis(channels_last, -1, 1), start, time.monotonic_ns())
                )
            else:
                yield None

    def close(self) -> None:
        self.backend.note("program closed")


def _exists(path: str) -> bool:
    try:
        with open(path):
            return True
    except FileNotFoundError:
        return False
