"""A vendor's backend that is right, and ones that are wrong in one way each."""

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx

from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions, Health, LayerTensor, Program, Ranges
from npu_wire.device import Capabilities
from npu_wire.errors import InvalidInput, NpuError, UnsupportedModel
from npu_wire.layer_map import Array, Float32Array, Int8Array, LayerMap, LayerSpec


class VendorProgram:
    """Delegates to a program of `reference`; faults override one method."""

    def __init__(self, inner: Program) -> None:
        self._inner = inner

    @property
    def layer_map(self) -> LayerMap:
        return self._inner.layer_map

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        return self._inner.parameters

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        self._inner.load_weights(tensors)

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        layers = self._inner.layer_map.layers
        return (
            tensor and replace(tensor, data=self.yielded(layers[tensor.layer], tensor.data.copy(), taps))
            for tensor in self._inner.forward(inputs, taps)
        )

    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        return data

    def close(self) -> None:
        self._inner.close()


class VendorBackend:
    """An NPU with the arithmetic of `tflm` and few operators."""

    operators: tuple[str, ...] = ("Conv", "Relu", "Flatten", "Gemm", "Mul", "Add", "Tanh")
    runs: tuple[str, ...] = operators
    program: type[VendorProgram] = VendorProgram

    def __init__(self, options: BackendOptions) -> None:
        self._inner = ReferenceBackend(BackendOptions(profile="tflm"))

    def open(self) -> Capabilities:
        known = self._inner.open()
        mark = replace(known.fingerprint, backend="vendor", vendor="nobody", model="one")
        return replace(known, fingerprint=mark, operators=self.operators, max_batch=32)

    def close(self) -> None:
        pass

    def probe(self) -> Health:
        return Health(ok=True)

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        program = self._inner.compile(model, ranges)
        for node in onnx.load_from_string(model).graph.node:
            if node.op_type not in (*self.runs, "Constant"):
                raise self.refusal(node)
        return self.program(Batched(program))

    def refusal(self, node: onnx.NodeProto) -> NpuError:
        return UnsupportedModel(f"node '{node.name}' ({node.op_type}): this NPU has no such operator")


class Batched(VendorProgram):
    """Holds to the vendor's own batch limit."""

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        if any(len(array) > 32 for array in inputs.values()):
            raise InvalidInput("more samples than this NPU takes, which is 1 to 32")
        return self._inner.forward(inputs, taps)


class OffByOne(VendorProgram):
    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        if layer.op == "Mul":
            data.flat[0] = data.flat[0] - 1 if data.flat[0] > 0 else data.flat[0] + 1
        return data


class ReusesMemory(VendorProgram):
    def __init__(self, inner: Program) -> None:
        super().__init__(inner)
        self._buffers: dict[str, Int8Array] = {}

    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        buffer = self._buffers.setdefault(layer.name, data)
        if buffer.shape != data.shape:
            return data
        np.copyto(buffer, data)
        return buffer


class Nondeterministic(VendorProgram):
    """Every seventh tensor has another bit."""

    calls = 0

    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        self.calls += 1
        if self.calls % 7 == 0:
            data.flat[-1] ^= 1
        return data


class InputsByOrder(VendorProgram):
    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        return super().forward(self.layer_map.named(*inputs.values()), taps)


class LastLayerOnly(VendorProgram):
    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        due = {*taps, len(self.layer_map.layers) - 1}
        return (t for t in super().forward(inputs, taps) if t is None or t.layer in due)


class ForgetsShapes(VendorProgram):
    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        return dict.fromkeys(self._inner.parameters, ())


class HalfAnUpdate(VendorProgram):
    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        for name, array in tensors.items():
            self._inner.load_weights({name: array})


class LateWeights(VendorProgram):
    """Weights take effect one update later."""

    waiting: Mapping[str, Float32Array] = {}

    def load_weights(self, tensors: Mapping[str, Float32Array]) -> None:
        self._inner.load_weights({})
        self._inner.load_weights(self.waiting)
        self.waiting = tensors


class SamplesMix(VendorProgram):
    """A sample's neighbours show."""

    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        if len(data) in (2, 3):
            data.flat[0] ^= 1
        return data


class TapsShow(VendorProgram):
    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        if len(taps) == 1:
            data.flat[0] ^= 1
        return data


class WrongScale(VendorProgram):
    @property
    def layer_map(self) -> LayerMap:
        inner = self._inner.layer_map
        wrong = [
            replace(spec, output=replace(spec.output, scale=2 * spec.output.scale)) for spec in inner.layers
        ]
        return replace(inner, layers=tuple(wrong))


class DeniesSaturation(VendorProgram):
    @property
    def layer_map(self) -> LayerMap:
        inner = self._inner.layer_map
        wrong = tuple(replace(spec, saturation_low=-129, saturation_high=128) for spec in inner.layers)
        return replace(inner, layers=wrong)


class NeverCloses(VendorProgram):
    def close(self) -> None:
        pass


class ServesOtherwise(VendorProgram):
    """Other bits on a server's thread."""

    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        if threading.current_thread() is not threading.main_thread():
            data.flat[0] ^= 1
        return data


class WritesInput(VendorProgram):
    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        yield from self._inner.forward(inputs, taps)
        for array in inputs.values():
            array[:] = 0


def with_program(program: type[VendorProgram]) -> type[VendorBackend]:
    """The vendor's backend with another kind of program."""
    return type(program.__name__, (VendorBackend,), {"program": program})


class RunsMore(VendorBackend):
    """Runs what it does not declare."""

    operators = tuple(op for op in VendorBackend.operators if op != "Tanh")


class DeclaresMore(VendorBackend):
    """Declares what it does not run."""

    operators = (*VendorBackend.operators, "Sigmoid")


class DeclaresUnknown(VendorBackend):
    """Declares what nobody can try."""

    operators = (*VendorBackend.operators, "Frobnicate")


class AnotherOutput(VendorBackend):
    """Returns the first of two layers that are added."""

    def compile(self, model: bytes, ranges: Ranges) -> Program:
        network = onnx.load_from_string(model)
        if "Add" in [node.op_type for node in network.graph.node[2:]]:
            network.graph.output[0].name = network.graph.node[0].output[0]
        return super().compile(network.SerializeToString(), ranges)


class RefusesVaguely(VendorBackend):
    def refusal(self, node: onnx.NodeProto) -> NpuError:
        return UnsupportedModel("this model cannot run")


class RefusesAsInvalid(VendorBackend):
    def refusal(self, node: onnx.NodeProto) -> NpuError:
        return InvalidInput(f"node '{node.name}' ({node.op_type}): this NPU has no such operator")


class GrowsFirmware(VendorBackend):
    """Says another thing each time that it is opened."""

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options)
        self._opened = 0

    def open(self) -> Capabilities:
        known = super().open()
        self._opened += 1
        return replace(known, fingerprint=replace(known.fingerprint, firmware=str(self._opened)))


class OneAtATime(VendorProgram):
    """A program's buffers are the device's, so that another one's batch writes into them."""

    running: ClassVar[list["OneAtATime"]] = []

    def forward(self, inputs: Mapping[str, Array], taps: Collection[int]) -> Iterator[LayerTensor | None]:
        self.running[:] = [self]
        yield from super().forward(inputs, taps)

    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        if self.running != [self]:
            data.flat[0] ^= 1
        return data


class OwnArithmetic(VendorBackend):
    """Its arithmetic is none of our profiles."""

    def open(self) -> Capabilities:
        known = super().open()
        mark = replace(known.fingerprint, profile="its own", profile_hash="1" * 64)
        return replace(known, fingerprint=mark)


class FarOff(VendorProgram):
    def yielded(self, layer: LayerSpec, data: Int8Array, taps: Collection[int]) -> Int8Array:
        return data ^ np.int8(64) if layer.op == "Lut" else data


class OwnArithmeticFarOff(OwnArithmetic):
    program = FarOff
