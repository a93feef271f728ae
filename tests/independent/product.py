"""The code under test: the one module of this room that knows it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from npu_server.backends.emulator.kernels import EmulatorKernels
from npu_server.backends.reference import ReferenceKernels
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.weights import Prepared
from npu_server.execution.program import Kernels, compile_program
from npu_server.numerics.profile import Profile, load_profile
from npu_wire.errors import NpuError as NpuError

from .formulas import Quantization, QuantizedWeights
from .quantizer import Ranges

BACKENDS: dict[str, Callable[[Profile], Kernels[Any, Any]]] = {
    "reference": ReferenceKernels,
    "emulator": lambda profile: EmulatorKernels(profile, torch.device("cpu")),
}


@dataclass(frozen=True)
class CompiledLayer:
    """What the compiler made of a layer, and what a backend computed.

    Attributes:
        name: value name.
        op: as the layer map calls it.
        inputs: value names of what it reads.
        y: of its output.
        weights: codes, scales and bias codes; None without weights.
        codes: its output by value, int8 (n, ...).
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    y: Quantization
    weights: QuantizedWeights | None
    codes: np.ndarray


@dataclass(frozen=True)
class Compiled:
    """A whole network as the product sees it."""

    input: str
    x: Quantization
    layers: tuple[CompiledLayer, ...]


class _Recording:
    """Kernels of a backend that keep what the compiler hands them."""

    def __init__(self, kernels: Kernels[Any, Any]) -> None:
        self.prepared: dict[str, Prepared] = {}
        self._kernels, self.image_layout = kernels, kernels.image_layout

    def pack(self, layer: Layer, prepared: Prepared) -> Any:
        self.prepared[layer.spec.name] = prepared
        return self._kernels.pack(layer, prepared)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


def profile(name: str, per_channel: bool = True) -> Profile:
    """A shipped profile, or the same with one weight scale a tensor."""
    shipped = load_profile(name)
    return replace(shipped, weights=replace(shipped.weights, per_channel=per_channel))


def compile_and_run(
    model: bytes, ranges: Ranges, codes: np.ndarray, arithmetic: Profile, backend: str
) -> Compiled:
    """Compiles a float model and runs it, every tensor tapped.

    Args:
        model: ONNX bytes.
        ranges: (min, max) by value name.
        codes: input, int8.
        arithmetic: the profile.
        backend: one of `BACKENDS`.
    """
    recording = _Recording(BACKENDS[backend](arithmetic))
    program = compile_program(model, ranges, arithmetic, recording, len(codes))
    specs = program.layer_map.layers
    tensors = {
        t.layer: np.ascontiguousarray(t.data)
        for t in program.forward(program.layer_map.named(codes), range(len(specs)))
        if t
    }
    layers = []
    for index, spec in enumerate(specs):
        made = recording.prepared[spec.name].weights
        weights = None
        if made is not None:
            weights = QuantizedWeights(made.codes, made.scales.astype(np.float32), made.bias)
        y = Quantization(np.float32(spec.output.scale), spec.output.zero_point)
        layers.append(CompiledLayer(spec.name, spec.op, spec.inputs, y, weights, tensors[index]))
    entry = program.layer_map.inputs[0]
    x = Quantization(np.float32(entry.scale), entry.zero_point)
    return Compiled(entry.name, x, tuple(layers))
