"""What the suite talks to: a backend in this process, or (in `wire`) one behind a server."""

from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from npu_server.seam import Backend, Program, Ranges
from npu_wire.device import Capabilities
from npu_wire.errors import DeviceFault
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap


class CompiledModel(Protocol):
    """A model on the target under test."""

    @property
    def layer_map(self) -> LayerMap:
        """Inputs, layers and outputs."""
        ...

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Replaces initializers; see `npu_server.seam.Program.load_weights`."""
        ...

    def run(self, inputs: Mapping[str, Array], taps: Collection[int]) -> dict[int, Int8Array]:
        """Tensors of the tapped layers and of the outputs, in arrays of their own."""
        ...

    def close(self) -> None:
        """Frees it; idempotent."""
        ...


class Target(Protocol):
    """Where models are compiled.

    Attributes:
        route: how it is reached, for the report.
    """

    route: str

    @property
    def capabilities(self) -> Capabilities:
        """What it says of itself."""
        ...

    def compile(self, model: bytes, ranges: Ranges) -> CompiledModel:
        """Compiles a float ONNX model."""
        ...


class LocalTarget:
    """A backend in this process.

    Args:
        backend: opened here, closed by whoever made it.

    Raises:
        DeviceFault: the device is not there or not well.
    """

    route = "in process"

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._capabilities = backend.open()
        health = backend.probe()
        if not health.ok:
            raise DeviceFault(f"the device is not well: {health.detail}")

    @property
    def capabilities(self) -> Capabilities:
        """What it says of itself."""
        return self._capabilities

    def compile(self, model: bytes, ranges: Ranges) -> "LocalModel":
        """Compiles a float ONNX model."""
        return LocalModel(self.backend.compile(model, ranges))


class LocalModel:
    """A program in this process.

    Args:
        program: what the backend compiled.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layer_map = program.layer_map

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        """Replaces initializers."""
        self.program.load_weights(tensors)

    def run(self, inputs: Mapping[str, Array], taps: Collection[int]) -> dict[int, Int8Array]:
        """Copies each tensor at the moment when it is yielded."""
        return {
            tensor.layer: np.array(tensor.data)
            for tensor in self.program.forward(inputs, taps)
            if tensor is not None
        }

    def close(self) -> None:
        """Closes the program."""
        self.program.close()


def run_all(compiled: CompiledModel, *inputs: Array) -> dict[str, Int8Array]:
    """Every layer's tensor by name, of inputs in the layer map's order."""
    layers = compiled.layer_map.layers
    outputs = compiled.run(compiled.layer_map.named(*inputs), range(len(layers)))
    return {layers[position].name: tensor for position, tensor in outputs.items()}
