"""Layers of a compiled network, computed one by one by our backends on inputs that somebody else chose."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from npu_server.backends.emulator import native
from npu_server.backends.emulator.kernels import EmulatorKernels
from npu_server.backends.reference import ReferenceKernels
from npu_server.compile import graph as g
from npu_server.compile.planning.fusion import fuse
from npu_server.compile.planning.lowering import Layer, lower
from npu_server.compile.planning.weights import Prepared, prepare
from npu_server.compile.reading.model import read_model
from npu_server.compile.reading.operators import import_model
from npu_server.execution.pairs import in_order, quantizations
from npu_server.execution.program import Kernels
from npu_server.numerics.profile import Profile
from npu_server.numerics.scales import Quantization
from npu_wire.layer_map import Int8Array, MemoryLayout


class Unjudged(Exception):
    """The judge cannot compute this layer; the message says why."""


@dataclass(frozen=True)
class JudgedLayer:
    """One layer with its weights: all that a judge needs to author it.

    Attributes:
        layer: as compiled.
        prepared: quantized weights, multipliers, tables.
        input_shapes: of each of its inputs, without the batch.
    """

    layer: Layer
    prepared: Prepared
    input_shapes: tuple[tuple[int, ...], ...]


Job = tuple[JudgedLayer, list[Int8Array]]
"""A layer and what it is to be judged on."""


def constants_as_activations(judged: JudgedLayer, inputs: list[Int8Array]) -> Job:
    """The same layer with its constant operands among its inputs, where an engine's operator has them."""
    layer, operator, prepared = judged.layer, judged.layer.operator, judged.prepared
    batch = len(inputs[0])
    if isinstance(operator, g.Add | g.Sub | g.Mul | g.MatMul) and prepared.operand is not None:
        codes = prepared.operand.codes
        shape = codes.shape[1:] if isinstance(operator, g.MatMul) else layer.shape
        operand = np.broadcast_to(codes, (batch, *shape))
        inputs = in_order(operator, inputs, np.ascontiguousarray(operand))
        sources = tuple(quantizations(layer, operator, prepared))
        return replace(judged, layer=replace(layer, operator=type(operator)(), sources=sources)), inputs
    if isinstance(operator, g.Concat) and operator.constants:
        inputs, own = list(inputs), list(layer.sources)
        for (position, _), codes in zip(operator.constants, prepared.joined, strict=True):
            inputs.insert(position, np.ascontiguousarray(np.broadcast_to(codes, (batch, *codes.shape[1:]))))
            own.insert(position, Quantization(layer.scale, layer.output.zero_point))
        return replace(
            judged, layer=replace(layer, operator=g.Concat(operator.axis), sources=tuple(own))
        ), inputs
    if isinstance(operator, g.Extreme) and operator.constants:
        target = Quantization(layer.scale, layer.output.zero_point)
        wide = [np.ascontiguousarray(np.broadcast_to(c, (batch, *c.shape[1:]))) for c in prepared.joined]
        sources = (*layer.sources, *[target] * len(wide))
        bare = replace(layer, operator=g.Extreme(operator.largest), sources=sources)
        return replace(judged, layer=bare), [*inputs, *wide]
    return judged, inputs


class Judge(Protocol):
    """An engine that nobody here wrote."""

    name: str

    def run(self, judged: JudgedLayer, inputs: list[Int8Array]) -> Int8Array:
        """The layer's output by the engine, logical order.

        Raises:
            Unjudged: it has no such operator, or not with these attributes.
        """
        ...

    def run_all(self, jobs: list[Job]) -> list[Int8Array]:
        """The outputs of several layers, computed in one go.

        Raises:
            Unjudged: one of them is not to be had; the others are lost with it.
        """
        ...


class Network:
    """A model that is compiled again and again, with other ranges each time."""

    def __init__(self, model: bytes) -> None:
        """Reads a model.

        Args:
            model: ONNX bytes.
        """
        graph, self._constants = import_model(read_model(model))
        self._graph = fuse(graph, self._constants)

    def _lower(self, ranges: Mapping[str, tuple[float, float]], profile: Profile) -> tuple[Layer, ...]:
        return lower(self._graph, self._constants, ranges, profile, MemoryLayout.CONTIGUOUS).layers

    def _judged(self, layers: tuple[Layer, ...], index: int, profile: Profile) -> JudgedLayer:
        layer = layers[index]
        shapes = {entry.name: entry.shape for entry in self._graph.inputs}
        shapes |= {layer.spec.name: layer.shape for layer in layers}
        prepared = prepare(layer, self._constants, profile)
        return JudgedLayer(layer, prepared, tuple(shapes[name] for name in layer.spec.inputs))

    def layers(self, ranges: Mapping[str, tuple[float, float]], profile: Profile) -> list[JudgedLayer]:
        """All layers, in the order of execution."""
        layers = self._lower(ranges, profile)
        return [self._judged(layers, index, profile) for index in range(len(layers))]

    def last_layer(self, ranges: Mapping[str, tuple[float, float]], profile: Profile) -> JudgedLayer:
        """The last one alone."""
        return self._judged(self._lower(ranges, profile), -1, profile)


def compile_layers(
    model: bytes, ranges: Mapping[str, tuple[float, float]], profile: Profile
) -> list[JudgedLayer]:
    """All layers of a model, in the order of execution."""
    return Network(model).layers(ranges, profile)


def our_outputs(judged: JudgedLayer, inputs: list[Int8Array], profile: Profile) -> list[Int8Array]:
    """The layer's output by `reference` and by `emulator`: on torch, and on each set of native kernels."""
    backends: list[Kernels[Any, Any]] = [
        ReferenceKernels(profile),
        EmulatorKernels(profile, torch.device("cpu"), levels=()),
    ]
    if isinstance(judged.layer.operator, g.Conv | g.Gemm):
        cpu = torch.device("cpu")
        backends += [EmulatorKernels(profile, cpu, levels=(level,)) for level in native.levels()]
    outputs = []
    for kernels in backends:
        packed = kernels.pack(judged.layer, judged.prepared)
        result = kernels.execute(judged.layer, packed, [kernels.load(x) for x in inputs])
        outputs.append(np.ascontiguousarray(kernels.export(judged.layer, result)))
    return outputs


def channels_last(x: Int8Array) -> Int8Array:
    """(N, C, H, W) as (N, H, W, C); other ranks as they are."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else np.ascontiguousarray(x)


def channels_first(x: Int8Array) -> Int8Array:
    """The way back."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x
