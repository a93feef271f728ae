"""One-layer float ONNX models with chosen scales, compiled, so that judges can author the same layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.planning.fusion import fuse
from npu_server.compile.planning.lowering import Layer, lower
from npu_server.compile.planning.weights import Prepared, prepare
from npu_server.compile.reading.model import read_model
from npu_server.compile.reading.operators import import_model
from npu_server.numerics.profile import load_profile
from npu_server.seam import Backend, BackendOptions
from npu_wire.layer_map import MemoryLayout


class TorchEmulator(EmulatorBackend):
    """The emulator as it is where no native kernels are."""

    def __init__(self, options: BackendOptions) -> None:
        super().__init__(options, levels=())


BACKENDS: tuple[type[Backend], ...] = (ReferenceBackend, EmulatorBackend, TorchEmulator)


@dataclass(frozen=True)
class Scale:
    """A scale and a zero point that a range is made for."""

    scale: float
    zero_point: int

    @property
    def range(self) -> tuple[float, float]:
        """The range that an affine profile turns into just these."""
        scale = float(np.float32(self.scale))
        return (-128 - self.zero_point) * scale, (127 - self.zero_point) * scale


@dataclass(frozen=True)
class SingleLayer:
    """A compiled model; `layer` is its last one."""

    model: bytes
    ranges: dict[str, tuple[float, float]]
    profile: str
    layer: Layer
    prepared: Prepared

    def run(self, backend: type[Backend], batch: np.ndarray) -> dict[str, np.ndarray]:
        """Every layer's output by name."""
        program = backend(BackendOptions(profile=self.profile)).compile(self.model, self.ranges)
        layers = program.layer_map.layers
        return {
            layers[t.layer].name: t.data
            for t in program.forward(program.layer_map.named(batch), range(len(layers)))
            if t
        }


def single_layer(
    profile: str,
    nodes: Sequence,
    shape: tuple[int, ...],
    scales: dict[str, Scale],
    initializers: dict[str, np.ndarray] | None = None,
) -> SingleLayer:
    """Compiles a model with input "x" and output "y".

    Args:
        profile: name of the profile.
        nodes: ONNX nodes.
        shape: of the input, without the batch.
        scales: value name -> wanted scale.
        initializers: name -> array.
    """
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "others"])],
        [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    ranges = {name: scale.range for name, scale in scales.items()}
    rules = load_profile(profile)
    imported, constants = import_model(read_model(model))
    plan = lower(fuse(imported, constants), constants, ranges, rules, MemoryLayout.CONTIGUOUS)
    return SingleLayer(model, ranges, profile, plan.layers[-1], prepare(plan.layers[-1], constants, rules))


def pair_layer(
    profile: str, op: str, scales: tuple[Scale, Scale, Scale], seed: int, **attributes
) -> SingleLayer:
    """A layer "y" of two operands "a" and "b", both computed from "x" so that their codes go all over INT8.

    Args:
        profile: name of the profile.
        op: ONNX operator with two inputs.
        scales: of a, b and y.
        seed: of the weights.
        attributes: of the node.
    """
    rng, channels = np.random.default_rng(seed), 8
    nodes, weights = [], {}
    for name, scale in zip("ab", scales, strict=False):
        weights[name + "_w"] = rng.normal(0, 0.5 * scale.scale / 0.05, (channels, channels, 2, 2)).astype(
            np.float32
        )
        nodes.append(helper.make_node("Conv", ["x", name + "_w"], [name], "conv_" + name, pads=[1, 0, 0, 1]))
    nodes.append(helper.make_node(op, ["a", "b"], ["y"], "pair", **attributes))
    named = dict(zip("aby", scales, strict=True)) | {"x": Scale(0.05, -3)}
    return single_layer(profile, nodes, (channels, 24, 24), named, weights)


def random_codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Every INT8 code, extremes included, as likely as any other."""
    return rng.integers(-128, 128, shape).astype(np.int8)
