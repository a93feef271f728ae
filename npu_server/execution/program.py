"""A compiled program: its weights and the loop over its layers. Only the kernels are the backend's."""

import time
from collections.abc import Collection, Generator, Iterator, Mapping
from typing import Any, Protocol, TypeVar, cast

from onnx import ModelProto

from npu_server.compile.graph import Graph, HostPart
from npu_server.compile.planning.fusion import fuse, refusals
from npu_server.compile.planning.lowering import Layer, Plan, between_calibrated, lower, with_bounds_of_now
from npu_server.compile.planning.weights import Prepared, prepare
from npu_server.compile.reading.constants import Constants
from npu_server.compile.reading.importer import HostRules
from npu_server.compile.reading.model import read_model
from npu_server.compile.reading.operators import import_model
from npu_server.execution.host_part import MixedSamples, open_part, refuse_mixed_samples
from npu_server.execution.slices import samples_at_once
from npu_server.numerics.profile import Profile
from npu_server.seam import Awaited, LayerTensor, Ranges
from npu_wire.errors import DeviceFault, InvalidInput, NonFiniteInput, NpuError, UnsupportedModel
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap, MemoryLayout
from npu_wire.tensors import check_inputs, is_finite

Tensor = TypeVar("Tensor")
Packed = TypeVar("Packed")


class Kernels(Protocol[Tensor, Packed]):
    """What a backend adds: its own tensors, its own form of the weights, and the arithmetic of one layer."""

    image_layout: MemoryLayout
    work_at_once: int
    """Multiplications that take it the tenth of a second or so for which others may wait."""

    def pack(self, layer: Layer, prepared: Prepared) -> Packed:
        """Brings prepared weights into the form that `execute` wants."""
        ...

    def load(self, batch: Int8Array) -> Tensor:
        """Takes a quantized input, int8 (n, *shape)."""
        ...

    def execute(self, layer: Layer, packed: Packed, inputs: list[Tensor]) -> Tensor:
        """Computes one layer into memory of its own."""
        ...

    def join(self, parts: list[Tensor]) -> Tensor:
        """Puts samples that were computed one after the other together, into memory of its own."""
        ...

    def export(self, layer: Layer, tensor: Tensor) -> Int8Array:
        """The tensor as NumPy, logical shape (n, *layer.shape), in the layout that the layer map tells."""
        ...


_PreparedLayers = list[tuple[Layer, Any] | None]
"""Each layer with its packed weights; None: they have not all come."""


class CompiledProgram:
    """A `npu_server.seam.Program` on some kernels."""

    def __init__(
        self, plan: Plan, constants: Constants, profile: Profile, kernels: Kernels[Any, Any], max_batch: int
    ) -> None:
        """Prepares all weights.

        Args:
            plan: layers and layer map.
            constants: the model's own weights.
            profile: the arithmetic.
            kernels: of the backend.
            max_batch: largest batch that `forward` takes.
        """
        self._plan = plan
        self._constants = constants
        self._profile = profile
        self._kernels = kernels
        self._max_batch = max_batch
        self._packed: _PreparedLayers = [self._pack(layer, constants) for layer in plan.layers]
        self._last_use = _last_uses(plan)
        self._at_once = [samples_at_once(x, plan.layer_map, kernels.work_at_once) for x in plan.layers]
        names = {name for layer in plan.layers for name in layer.spec.parameters}
        self._parameters = {name: constants.array(name).shape for name in names}

    @property
    def layer_map(self) -> LayerMap:
        """Inputs, layers and outputs."""
        return self._plan.layer_map

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Every initializer that a layer derives from."""
        return self._parameters

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Replaces some initializers, all or nothing; prepares only the layers that derive from them.

        Raises:
            InvalidInput: a name that no layer derives from, another shape or dtype than compiled.
            NonFiniteInput: NaN or infinity.
        """
        weights = self.begin_weights(tensors)
        for name, array in tensors.items():
            for _ in weights.take(name, array):
                pass
        weights.finish()

    def begin_weights(self, names: Collection[str]) -> "_Incoming":
        """Weights that come tensor by tensor; see `npu_server.seam.LoadsInOrder`.

        Raises:
            InvalidInput: a name that no layer derives from.
        """
        for name in names:
            self._check_name(name)
        return _Incoming(self, names)

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        """Runs one batch; see `npu_server.seam.Program.forward`.

        Weights that are loaded while a batch runs do not touch it.

        Raises:
            InvalidInput: another name, dtype or shape than compiled, an empty or too large batch, a tap that
                does not exist.
            DeviceFault: the program is closed.
        """
        return cast(Iterator[LayerTensor | None], self._start(inputs, taps, self._packed))  # none is awaited

    def _start(
        self, inputs: Mapping[str, Array], taps: Collection[int], packed: _PreparedLayers
    ) -> Iterator[LayerTensor | Awaited | None]:
        samples = self._check_batch(inputs, taps)
        return self._run(inputs, samples, self.layer_map.output_layers.union(taps), packed)

    def _run(
        self, inputs: Mapping[str, Array], samples: int, wanted: frozenset[int], packed: _PreparedLayers
    ) -> Iterator[LayerTensor | Awaited | None]:
        held: dict[str, Any] = dict(inputs)
        for spec in self.layer_map.quantized_inputs:
            held[spec.name] = self._kernels.load(held[spec.name])
        for i, layer in enumerate(self._plan.layers):
            while (ready := packed[i]) is None:
                yield Awaited(i)
            start_ns = time.monotonic_ns()
            name, sources = layer.spec.name, layer.spec.inputs
            tensor = yield from self._execute(i, ready, [held[source] for source in sources], samples)
            for source in set(sources):
                if self._last_use[source] == i:
                    del held[source]
            if name in self._last_use:
                held[name] = tensor
            if i in wanted:
                data = self._kernels.export(layer, tensor)
                yield LayerTensor(i, data, start_ns, time.monotonic_ns())
            else:
                yield None

    def _execute(self, i: int, packed: Any, inputs: list[Any], samples: int) -> Generator[None, None, Any]:
        """One layer; where it is much work, some samples at a time, with a pause in between."""
        (layer, packed), at_once = packed, self._at_once[i]
        if samples <= at_once:
            return self._kernels.execute(layer, packed, inputs)
        parts: list[Any] = []
        for first in range(0, samples, at_once):
            if parts:
                yield
            parts.append(self._kernels.execute(layer, packed, [x[first : first + at_once] for x in inputs]))
        return self._kernels.join(parts)

    def close(self) -> None:
        """Frees weights; idempotent."""
        self._packed = []

    def _pack(self, layer: Layer, constants: Constants) -> tuple[Layer, Any]:
        layer = with_bounds_of_now(layer, constants, self._profile)
        return layer, self._kernels.pack(layer, prepare(layer, constants, self._profile))

    def _check_name(self, name: str) -> None:
        if name not in self._parameters:
            raise InvalidInput(f"weights {name!r}: no layer of this program derives from such an initializer")

    def _check(self, name: str, array: Float32Array) -> None:
        self._check_name(name)
        expected = self._constants.array(name)
        if array.dtype != expected.dtype or array.shape != expected.shape:
            raise InvalidInput(
                f"weights {name!r}: {array.dtype} of shape {array.shape}; compiled with {expected.dtype} of "
                f"shape {expected.shape}"
            )
        if not is_finite(array):
            raise NonFiniteInput(f"weights {name!r} hold NaN or infinity; training has diverged")

    def _check_batch(self, inputs: Mapping[str, Array], taps: Collection[int]) -> int:
        """Checks everything about a batch and returns how many samples it has."""
        if not self._packed:
            raise DeviceFault("the program is closed")
        samples = check_inputs(self.layer_map.inputs, inputs, self._max_batch)
        for tap in taps:
            if not 0 <= tap < len(self._plan.layers):
                raise InvalidInput(f"tap {tap}: the program has layers 0 to {len(self._plan.layers) - 1}")
        return samples


class _Incoming:
    """New weights on top of those of a program; see `npu_server.seam.WeightsOnTheWay`."""

    def __init__(self, program: CompiledProgram, names: Collection[str]) -> None:
        self._program = program
        self._due = set(names)
        self._constants = program._constants.branch()
        self._layers_of: dict[str, list[int]] = {name: [] for name in names}
        self._lacking: dict[int, int] = {}
        for i, layer in enumerate(program._plan.layers):
            lacking = self._due.intersection(layer.spec.parameters)
            if lacking:
                self._lacking[i] = len(lacking)
            for name in lacking:
                self._layers_of[name].append(i)
        self._packed: _PreparedLayers = [
            None if i in self._lacking else packed for i, packed in enumerate(program._packed)
        ]

    def take(self, name: str, array: Float32Array) -> Iterator[None]:
        """Takes a tensor and prepares the layers that lack no other."""
        self._program._check(name, array)
        self._due.remove(name)
        self._constants.take(name, array, self._due)
        for i in self._layers_of[name]:
            self._lacking[i] -= 1
            if not self._lacking[i]:
                self._packed[i] = self._program._pack(self._program._plan.layers[i], self._constants)
                yield

    def forward(
        self, inputs: Mapping[str, Array], taps: Collection[int]
    ) -> Iterator[LayerTensor | Awaited | None]:
        """Runs a batch with these weights, as far as they are there."""
        return self._program._start(inputs, taps, self._packed)

    def finish(self) -> None:
        """Makes them the program's."""
        assert not self._due, f"{sorted(self._due)} have not come"
        self._program._constants, self._program._packed = self._constants, self._packed


def compile_program(
    model: bytes, ranges: Ranges, profile: Profile, kernels: Kernels[Any, Any], max_batch: int
) -> CompiledProgram:
    """Compiles a float ONNX model for some kernels.

    Raises:
        InvalidModel, UnsupportedModel, NotCalibrated, InvalidInput: see
        `npu_server.seam.Backend.compile`.
    """
    proto, innermost = read_model(model), frozenset[str]()
    while True:
        graph, constants = _partitioned(proto, ranges, profile, innermost)
        plan = lower(graph, constants, ranges, profile, kernels.image_layout)
        try:
            for layer in plan.layers:
                if isinstance(layer.operator, HostPart):
                    open_part(layer, layer.operator)
                    prepared = prepare(layer, constants, profile)
                    refuse_mixed_samples(layer, layer.operator, prepared, plan.layer_map)
            return CompiledProgram(plan, constants, profile, kernels, max_batch)
        except MixedSamples as mixed:
            if mixed.name in innermost:
                raise UnsupportedModel(str(mixed)) from mixed
            innermost |= {mixed.name}  # perhaps they only lie otherwise than most often


def _partitioned(
    model: ModelProto, ranges: Ranges, profile: Profile, innermost: frozenset[str]
) -> tuple[Graph, Constants]:
    """The fused graph of what the NPU does; what it does not is a part of its host's, or the client's.

    Some of it shows only when all is fused: a comparison that no table took in, a value without a range. Then
    everything is read once more without it.
    """
    refused: dict[str, NpuError] = {}
    while True:
        graph, constants = import_model(model, HostRules(profile.takes_on_host, ranges, refused, innermost))
        fused = fuse(graph, constants, ranges)
        left = refusals(fused, profile) or between_calibrated(fused, ranges, profile)
        if not left:
            return fused, constants
        if left.keys() <= refused.keys():  # no node's own output: there is nothing to read otherwise
            raise next(iter(left.values()))
        refused |= left


def _last_uses(plan: Plan) -> dict[str, int]:
    return {source: i for i, layer in enumerate(plan.layers) for source in layer.spec.inputs}
