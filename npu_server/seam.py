"""The seam between the service and an NPU.

A backend is a class registered under the entry point group `npu_server.backends`. It is synchronous and
knows nothing of gRPC. `BackendOptions` is all it gets to know at construction. Errors are those of
`npu_wire.errors`.

Threads: one thread, the device's, makes every call but `Backend.compile`. That may come from any thread and
from several at once, beside whatever the device's thread does: it works on the model, not on the device; a
backend whose compiler is not safe for that takes a lock of its own.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from npu_wire.device import Capabilities
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap

ENTRY_POINT_GROUP = "npu_server.backends"

Ranges = Mapping[str, tuple[float, float]]
"""ONNX value name -> (min, max) of the activation, finite float32 numbers, min < max."""


@dataclass(frozen=True)
class BackendOptions:
    """What a backend is built from.

    Attributes:
        profile: name or path of a numerics profile; empty for a backend whose arithmetic is given.
        device: where to compute: "cpu", "cuda", "cuda:1".
        threads: worker threads of the backend's kernels; 0 leaves the library's default.
        extra: `--backend-option key=value` pairs, for the backend to check.
    """

    profile: str = ""
    device: str = "cpu"
    threads: int = 0
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Health:
    """Whether the device answers, and what to do if not."""

    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class LayerTensor:
    """The INT8 output of one layer.

    Attributes:
        layer: position in `Program.layer_map.layers`.
        data: int8, logical shape (batch, *spec.shape); its bytes in memory lie in the order that the spec's
            layout says (a channels-last tensor is a transposed view of a contiguous (N, H, W, C) array). The
            backend never writes to it again: it is sent later, from another thread.
        start_ns: `time.monotonic_ns()` when the device began the layer.
        end_ns: the same when it had finished.
    """

    layer: int
    data: Int8Array
    start_ns: int
    end_ns: int


class Program(Protocol):
    """A compiled model with weights."""

    @property
    def layer_map(self) -> LayerMap:
        """Inputs, layers and outputs, the same for the program's life."""
        ...

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every FP32 initializer that `load_weights` takes; constant as well."""
        ...

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Replaces some FP32 initializers, all or nothing; the others keep their value.

        Args:
            tensors: from now on the program's, to keep without a copy; nobody writes to them any more.

        Raises:
            InvalidInput: unknown name, other shape than compiled.
            NonFiniteInput: NaN or infinity in a tensor.
        """
        ...

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        """Runs one batch and yields each tapped layer's tensor as soon as it is there.

        The tensors of `layer_map.output_layers` are always yielded.

        After a layer that is not tapped it yields None, and so it may in the middle of a long one. So the
        caller has control at every layer: it may close the iterator there, or go on later and let other
        programs of the backend run in between. A device that runs a network in one go yields what is tapped
        when it is there, and no None.

        Args:
            inputs: exactly those of `layer_map.inputs`, by name: int8 codes of shape (n, *spec.shape) for a
                quantized one; the spec's dtype and (n, *spec.shape), or spec.shape where it is not batched,
                for a raw one; 1 <= n <= max_batch, the same in all. They are the caller's: read only.
            taps: positions in `layer_map.layers` of the tensors to yield.
        """
        ...

    def close(self) -> None:
        """Frees what the program holds; idempotent."""
        ...


@dataclass(frozen=True)
class Awaited:
    """What a forward pass yields in the place of a layer whose weights have not come.

    Attributes:
        layer: position in `Program.layer_map.layers`.
    """

    layer: int


class WeightsOnTheWay(Protocol):
    """New weights of a program, coming one by one. Dropped before `finish`, they have changed nothing."""

    def take(self, name: str, array: Float32Array) -> Iterator[None]:
        """Takes one of them, and prepares the layers that lack no other; control comes back after each.

        Args:
            name: of the initializer.
            array: its new value; from now on the program's, to keep without a copy.

        Raises:
            InvalidInput, NonFiniteInput: as `Program.load_weights`; these weights are of no use then.
        """
        ...

    def forward(
        self, inputs: Mapping[str, Array], taps: Collection[int]
    ) -> Iterator[LayerTensor | Awaited | None]:
        """`Program.forward` with these weights, before or after `finish`.

        Where the next layer's weights lack a tensor it yields `Awaited`, again and again until `take` has
        brought it.
        """
        ...

    def finish(self) -> None:
        """Makes them the weights of the program, once the last tensor has been taken.

        Raises:
            InvalidInput, NonFiniteInput: as `Program.load_weights`.
        """
        ...


@runtime_checkable
class LoadsInOrder(Protocol):
    """An extra ability of a program: it prepares layer by layer, and computes the first ones meanwhile.

    For a program without it, which takes weights whole, the service gathers them.
    """

    def begin_weights(self, names: Collection[str]) -> WeightsOnTheWay:
        """Begins an update of these initializers, all of which will be taken, in any order; one at a time.

        Raises:
            InvalidInput: a name that is none of `Program.parameters`.
        """
        ...


class Backend(Protocol):
    """An NPU."""

    def __init__(self, options: BackendOptions) -> None:
        """Checks the options; opens nothing.

        Raises:
            InvalidInput: an option or a profile that the backend does not know.
        """
        ...

    def open(self) -> Capabilities:
        """Takes hold of the device and tells what it is and can do, the same until `close` and after it.

        Raises:
            DeviceFault: there is no such device, or it cannot be used.
        """
        ...

    def close(self) -> None:
        """Lets go of the device; idempotent."""
        ...

    def probe(self) -> Health:
        """Asks the device whether it is well: after `open`, and while it serves.

        That is wherever the caller has control, so also between two layers of a batch. It takes less than a
        second, changes nothing, and answers for a dead device too instead of raising.
        """
        ...

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        """Compiles a float ONNX model; see the module about threads.

        Raises:
            InvalidModel: the bytes are not a readable model.
            UnsupportedModel: the NPU cannot run it; the message names node, operator and reason.
            NotCalibrated: an activation that needs a range has none.
            InvalidInput: a range that is not finite or of zero width.
        """
        ...
