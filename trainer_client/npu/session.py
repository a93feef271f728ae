"""What the PyTorch side needs of an NPU, whoever provides it: numpy in, numpy out, no network in sight."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from npu_wire.device import Capabilities
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap

Ranges = Mapping[str, tuple[float, float]]
"""ONNX value name -> (min, max) of the activation."""


@dataclass(frozen=True)
class LayerTiming:
    """When a layer's tensor came to be, in nanoseconds of this process's `time.monotonic_ns()`.

    Attributes:
        layer: position in the layer map.
        npu_start_ns: the NPU began the layer.
        npu_end_ns: the NPU had finished it.
        arrival_ns: its last byte was here.
    """

    layer: int
    npu_start_ns: int
    npu_end_ns: int
    arrival_ns: int


class PendingBatch(Protocol):
    """A batch that is on its way through the NPU."""

    def tensor(self, layer: int) -> Int8Array:
        """Waits for the tensor of a tapped layer, or of one in `layer_map.output_layers`.

        Returns:
            int8, logical shape (n, *spec.shape), read-only. Its memory order is that of the layer map's
            layout, so a channels-last tensor is a transposed view.

        Raises:
            Timeout, ServerUnavailable, DeviceChanged, DeviceFault: see `npu_wire.errors`.
        """
        ...

    def timings(self) -> Sequence[LayerTiming]:
        """Timings of the tensors that have arrived so far."""
        ...


class Session(Protocol):
    """A compiled model on an NPU."""

    @property
    def layer_map(self) -> LayerMap:
        """Inputs, layers and outputs of the program."""
        ...

    def push_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Sends changed FP32 initializers; every batch submitted later runs with them.

        The arrays are the session's from now on, and nobody writes to them any more: one copy is what the
        session recovers with and what its user compares live weights with.

        Of an update that the NPU refuses nothing is loaded. The batches behind it raise the reason, and so
        does another update that was made before anyone knew. The next one is on top of what the NPU has.
        """
        ...

    def submit(self, inputs: Mapping[str, Array], taps: Collection[int]) -> PendingBatch:
        """Sends one batch and returns at once.

        Args:
            inputs: those of `layer_map.inputs` by name: int8 codes (n, *spec.shape) of a quantized one, the
                spec's dtype and shape of a raw one.
            taps: positions of the layers whose tensors are wanted; those in `layer_map.output_layers` always
                come.
        """
        ...

    def close(self) -> None:
        """Releases the session on the server; idempotent."""
        ...


class Npu(Protocol):
    """An NPU that models can be compiled for; what `trainer_client.connect` returns."""

    @property
    def info(self) -> Capabilities:
        """What it is and can do."""
        ...

    def compile(self, model: bytes, ranges: Ranges) -> Session:
        """Opens a session for a float ONNX model.

        Raises:
            UnsupportedModel, InvalidModel, NotCalibrated, InvalidInput, QuotaExceeded: see `npu_wire.errors`.
        """
        ...

    def close(self) -> None:
        """Closes every session and the connection, and stops an embedded server; idempotent."""
        ...
