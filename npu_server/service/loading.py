"""A weight update on its way to a program: its stream brings tensors, the device takes them."""

import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping

from npu_server.seam import Awaited, LayerTensor, LoadsInOrder, Program, WeightsOnTheWay
from npu_wire.errors import InvalidInput, NpuError
from npu_wire.layer_map import Array, Float32Array


class Loading:
    """One update.

    Args:
        version: the weights version that it leads to.
        names: the initializers that will come.

    Attributes:
        version: the weights version that it leads to.
        loaded: whether its weights are those of the program; changed by the device's thread.
        duration_ns: how long the device has worked on it so far.
    """

    def __init__(self, version: int, names: Collection[str]) -> None:
        self.version = version
        self.loaded = False
        self.duration_ns = 0
        self._names = names
        self._left = len(names)
        self._weights: WeightsOnTheWay | None = None
        self._lock = threading.Lock()
        self._arrived: deque[tuple[str, Float32Array]] = deque()
        self._abandoned = False
        self._reason: NpuError | None = None

    def put(self, tensors: Mapping[str, Float32Array]) -> None:
        """Brings tensors; the reader's side."""
        with self._lock:
            self._arrived.extend(tensors.items())

    def abandon(self, reason: NpuError | None) -> None:
        """Says that no more tensors will come; nothing happens where all are here."""
        with self._lock:
            if not self._abandoned:
                # A copy: where the other one is raised its frames hold this update.
                self._abandoned, self._reason = True, reason and type(reason)(*reason.args)

    @property
    def has_arrived(self) -> bool:
        """Whether a tensor waits to be taken."""
        return bool(self._arrived)

    @property
    def is_given_up(self) -> bool:
        """Whether it lacks tensors that will never come."""
        return self._abandoned and len(self._arrived) < self._left

    def why_given_up(self) -> NpuError:
        """Why who waits for the missing tensors does so in vain."""
        if self._reason is not None:
            return type(self._reason)(*self._reason.args)
        return InvalidInput(
            f"the stream ended before all tensors of weights version {self.version} had come, which a batch "
            "waits for; send the whole update"
        )

    def begin(self, program: Program) -> None:
        """First of the device's calls."""
        if isinstance(program, LoadsInOrder):
            self._weights = program.begin_weights(self._names)
        else:
            self._weights = _Whole(program)

    def take(self) -> Generator[bool, None, int]:
        """Takes the tensor that came first and, with the last one, loads; an `agenda.Job` but for its result.

        Returns:
            The bytes of the tensor, which are the program's now.

        Raises:
            NpuError: what the device has against the update.
        """
        assert self._weights is not None
        begin_ns = time.monotonic_ns()
        with self._lock:
            name, array = self._arrived.popleft()
            self._left -= 1
        for _ in self._weights.take(name, array):
            self.duration_ns += time.monotonic_ns() - begin_ns
            yield False
            begin_ns = time.monotonic_ns()
        if not self._left:
            self._weights.finish()
            self.loaded = True
        self.duration_ns += time.monotonic_ns() - begin_ns
        return array.nbytes

    def forward(
        self, inputs: Mapping[str, Array], taps: Collection[int]
    ) -> Iterator[LayerTensor | Awaited | None]:
        """A batch with these weights; see `npu_server.seam.WeightsOnTheWay.forward`."""
        assert self._weights is not None
        return self._weights.forward(inputs, taps)


class _Whole:
    """Gathers tensors for a program that takes them whole."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._tensors: dict[str, Float32Array] = {}
        self._loaded = False

    def take(self, name: str, array: Float32Array) -> Iterator[None]:
        """Only keeps it."""
        self._tensors[name] = array
        return iter(())

    def forward(
        self, inputs: Mapping[str, Array], taps: Collection[int]
    ) -> Iterator[LayerTensor | Awaited | None]:
        """Waits for all of them."""
        while not self._loaded:
            yield Awaited(0)
        yield from self._program.forward(inputs, taps)

    def finish(self) -> None:
        """Loads them."""
        self._program.load_weights(self._tensors)
        self._loaded, self._tensors = True, {}
