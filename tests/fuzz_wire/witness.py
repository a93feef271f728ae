"""The well-behaved client: trains and evaluates through the product's own client, and checks every bit."""

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

import trainer_client
from npu_server.registry import create_backend
from npu_server.seam import Backend, BackendOptions, Program
from npu_wire.device import Capabilities
from npu_wire.errors import NpuError, QuotaExceeded
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap, LayerSpec, MemoryLayout
from trainer_client.npu.session import LayerTiming, Npu, PendingBatch, Ranges, Session

from .recordings import PROFILE

STEPS_PER_SESSION = 40
_BATCH = 8
_PAUSE_S = 0.05


@dataclass
class Tally:
    """What the well-behaved client saw.

    Attributes:
        steps: of training and evaluation.
        sessions: opened.
        batches: whose tensors were all compared with `reference`.
        elements: compared.
        mismatches: elements that differ.
        refusals: a quota said no, and the client tried again.
        longest_step_s: longest step, with its retries.
        errors: what went wrong otherwise.
    """

    steps: int = 0
    sessions: int = 0
    batches: int = 0
    elements: int = 0
    mismatches: int = 0
    refusals: int = 0
    longest_step_s: float = 0.0
    errors: list[str] = field(default_factory=list)


class Net(nn.Module):
    """Convolutions with batch norm, a residual, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        return self.head((h + torch.relu(self.body(h))).mean((2, 3)))


class Witness:
    """Trains until it is stopped, in a thread of its own.

    Args:
        endpoint: of the server.
        seed: of weights and data.
        deadline_s: the longest that a step may take.
    """

    def __init__(self, endpoint: str, seed: int, deadline_s: float) -> None:
        self.tally = Tally()
        self._endpoint = endpoint
        self._seed = seed
        self._deadline_s = deadline_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness")
        self._thread.start()

    def stop(self) -> Tally:
        """Ends after the step that is under way."""
        self._stop.set()
        self._thread.join()
        return self.tally

    def _run(self) -> None:
        try:
            self._train()
        except Exception as error:
            self.tally.errors.append(f"gave up: {type(error).__name__}: {error}")

    def _train(self) -> None:
        torch.manual_seed(self._seed)
        torch.set_num_threads(1)
        data = torch.Generator().manual_seed(self._seed)
        model = Net()
        x = torch.randn(64, 3, 12, 12, generator=data)
        reference = create_backend("reference", BackendOptions(profile=PROFILE, threads=1))
        reference.open()
        with trainer_client.connect(self._endpoint, timeout_s=self._deadline_s) as npu:
            qat = trainer_client.prepare(model, x[:2], CheckedNpu(npu, reference, self.tally))
            self._step(lambda: qat.calibrate(x))
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            while not self._stop.wait(_PAUSE_S):
                chosen = torch.randint(64, (_BATCH,), generator=data)
                self._step(lambda: self._train_or_evaluate(qat, optimizer, x[chosen], chosen % 5))  # noqa: B023
                if self.tally.steps % STEPS_PER_SESSION == 0:
                    qat.close()
        reference.close()

    def _train_or_evaluate(
        self, qat: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
    ) -> None:
        if self.tally.steps % 4 == 3:
            with torch.no_grad():
                qat.eval()(x)
            return
        optimizer.zero_grad()
        nn.functional.cross_entropy(qat.train()(x), y).backward()
        optimizer.step()

    def _step(self, work: object) -> None:
        assert callable(work)
        begin = time.monotonic()
        while True:
            try:
                work()
                break
            except QuotaExceeded as refusal:
                self.tally.refusals += 1
                if time.monotonic() - begin > self._deadline_s:
                    raise TimeoutError(f"refused for {self._deadline_s} s: {refusal}") from None
                if self._stop.wait(0.2):
                    return
            except NpuError as error:
                self.tally.errors.append(f"step {self.tally.steps}: {type(error).__name__}: {error}"[:500])
                if len(self.tally.errors) > 20 or self._stop.wait(1.0):
                    raise
        self.tally.steps += 1
        self.tally.longest_step_s = max(self.tally.longest_step_s, time.monotonic() - begin)


class CheckedNpu:
    """The NPU over the wire with `reference` beside it: a `trainer_client.npu.session.Npu`.

    Args:
        remote: the connection.
        reference: computes the same in this process.
        tally: where comparisons are counted.
    """

    def __init__(self, remote: Npu, reference: Backend, tally: Tally) -> None:
        self._remote = remote
        self._reference = reference
        self._tally = tally

    @property
    def info(self) -> Capabilities:
        return self._remote.info

    def compile(self, model: bytes, ranges: Ranges) -> "CheckedSession":
        remote = self._remote.compile(model, ranges)
        self._tally.sessions += 1
        return CheckedSession(remote, self._reference.compile(model, ranges), self._tally)

    def close(self) -> None:
        self._remote.close()


class CheckedSession:
    """A session over the wire and the same program in this process."""

    def __init__(self, remote: Session, local: Program, tally: Tally) -> None:
        self._remote = remote
        self._local = local
        self._tally = tally
        if _without_layout(remote.layer_map) != _without_layout(local.layer_map):
            tally.errors.append("the layer map over the wire is not reference's")

    @property
    def layer_map(self) -> LayerMap:
        return self._remote.layer_map

    def push_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        self._local.load_weights({name: np.array(tensor) for name, tensor in tensors.items()})
        self._remote.push_weights(tensors)

    def submit(self, inputs: Mapping[str, Array], taps: Collection[int]) -> "CheckedBatch":
        every = range(len(self.layer_map.layers))
        pending = self._remote.submit(inputs, every)
        expected = {
            tensor.layer: np.array(tensor.data) for tensor in self._local.forward(inputs, every) if tensor
        }
        return CheckedBatch(pending, expected, self._tally)

    def close(self) -> None:
        self._remote.close()
        self._local.close()


class CheckedBatch:
    """A batch over the wire; waiting for its last tensor compares all of them."""

    def __init__(self, pending: PendingBatch, expected: dict[int, Int8Array], tally: Tally) -> None:
        self._pending = pending
        self._expected = expected
        self._tally = tally

    def tensor(self, layer: int) -> Int8Array:
        if layer == max(self._expected):
            for each, expected in self._expected.items():
                wrong = int(np.count_nonzero(self._pending.tensor(each) != expected))
                self._tally.mismatches += wrong
                self._tally.elements += expected.size
            self._tally.batches += 1
        return self._pending.tensor(layer)

    def timings(self) -> list[LayerTiming]:
        return list(self._pending.timings())


def _without_layout(layer_map: LayerMap) -> tuple[LayerSpec, ...]:
    contiguous = MemoryLayout.CONTIGUOUS
    return tuple(replace(each, output=replace(each.output, layout=contiguous)) for each in layer_map.layers)
