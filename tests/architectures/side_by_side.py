"""An NPU that is two backends at once: every INT8 tensor of every batch is computed by both and compared."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions, Program, Ranges
from npu_wire.device import Capabilities
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap
from trainer_client.npu.session import LayerTiming

SHARED = frozenset(
    {
        *("Add", "Sub", "Mul"),  # npu_server.execution.pairs.combine, which the emulator may tabulate first
        *("Lut", "Relu", "PRelu", "Concat"),  # tables that the compiler has made
        *("Mean", "ReduceSum", "AveragePool"),  # sums apart, npu_server.numerics.elementwise finishes them
    }
)
"""Operators that both backends finish with one function; so their equality says little and is not counted."""


@dataclass
class Comparison:
    """What was compared so far, by position in the layer map.

    Attributes:
        elements: INT8 numbers.
        mismatches: those that differ.
        last: every tensor of the last batch, of `reference`.
        batch: the last batch.
    """

    elements: dict[int, int] = field(default_factory=dict)
    mismatches: dict[int, int] = field(default_factory=dict)
    last: dict[int, Int8Array] = field(default_factory=dict)
    batch: Int8Array | None = None

    def add(self, layer: int, expected: Int8Array, actual: Int8Array) -> None:
        """Counts one tensor."""
        assert expected.shape == actual.shape
        assert expected.dtype == actual.dtype == np.int8
        self.elements[layer] = self.elements.get(layer, 0) + expected.size
        self.mismatches[layer] = self.mismatches.get(layer, 0) + int((expected != actual).sum())
        self.last[layer] = expected


class SideBySideNpu:
    """`trainer_client.npu.session.Npu` in this process; hands on what `emulator` computed."""

    def __init__(self, profile: str) -> None:
        options = BackendOptions(profile=profile)
        self.reference, self.emulator = ReferenceBackend(options), EmulatorBackend(options)
        self._told = self.emulator.open()
        self.comparison = Comparison()
        self.model, self.ranges = b"", dict[str, tuple[float, float]]()

    @property
    def info(self) -> Capabilities:
        """What the emulator tells."""
        return self._told

    def compile(self, model: bytes, ranges: Ranges) -> "SideBySideSession":
        """Compiles for both."""
        self.model, self.ranges = model, dict(ranges)
        programs = self.reference.compile(model, ranges), self.emulator.compile(model, ranges)
        return SideBySideSession(*programs, self.comparison)

    def close(self) -> None:
        """Closes the emulator."""
        self.emulator.close()


class SideBySideSession:
    """One model on both."""

    def __init__(self, reference: Program, emulator: Program, comparison: Comparison) -> None:
        self._programs = reference, emulator
        self._comparison = comparison

    @property
    def layer_map(self) -> LayerMap:
        """The emulator's."""
        return self._programs[1].layer_map

    def push_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Pushes to both."""
        for program in self._programs:
            program.load_weights(tensors)

    def submit(self, inputs: Mapping[str, Array], taps: Collection[int]) -> "ComparedBatch":
        """Runs both to the end, all layers tapped."""
        self._comparison.batch = next(iter(inputs.values()))
        every = range(len(self.layer_map.layers))
        tensors = {}
        forwards = [filter(None, program.forward(inputs, every)) for program in self._programs]
        for expected, actual in zip(*forwards, strict=True):
            assert expected.layer == actual.layer
            self._comparison.add(expected.layer, expected.data, actual.data)
            tensors[actual.layer] = actual.data
        return ComparedBatch(tensors)

    def close(self) -> None:
        """Closes both."""
        for program in self._programs:
            program.close()


class ComparedBatch:
    """A batch that both have computed."""

    def __init__(self, tensors: dict[int, Int8Array]) -> None:
        self._tensors = tensors

    def tensor(self, layer: int) -> Int8Array:
        """The emulator's output of a layer."""
        return self._tensors[layer]

    def timings(self) -> list[LayerTiming]:
        """None are taken."""
        return []
