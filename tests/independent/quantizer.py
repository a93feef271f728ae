"""A float network as the INT8 layers that docs/describe-your-npu.md says it becomes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import formulas
from .formulas import Quantization, QuantizedWeights
from .reading import FloatNetwork, Node

Ranges = Mapping[str, tuple[float, float]]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_PAIRS = ("Add", "Sub", "Mul")
_KEEPS_QUANTIZATION = ("MaxPool", "Pad", "Reshape", "Transpose")
_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_MEANS = ("GlobalAveragePool", "ReduceMean")


@dataclass(frozen=True)
class Rules:
    """What of a profile decides about quantization.

    Attributes:
        per_channel: weights have one scale an output channel.
        pools_keep_scale: an average pool's output has the input's scale and zero point.
    """

    per_channel: bool = True
    pools_keep_scale: bool = False


@dataclass(frozen=True)
class Step:
    """One INT8 layer.

    Attributes:
        op: ONNX operator; "Clamp" for a lone Relu or Clip, "Reshape" and "Mean" for all of their kinds.
        name: value name of its output.
        inputs: of the steps that it reads.
        fields: attributes of its ONNX node, as they are.
        y: of its output.
        bounds: (low, high) of a fused activation in real numbers.
        shape: of its output, batch included.
        weights: of Conv, ConvTranspose and Gemm.
        pads: of Pad: begin and end of each axis, as ONNX has them.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    fields: Mapping[str, Any]
    y: Quantization
    bounds: tuple[float, float]
    shape: tuple[int, ...]
    weights: QuantizedWeights | None = None
    pads: tuple[int, ...] = ()

    @property
    def low(self) -> int:
        """Smallest code that the fused activation lets pass."""
        return formulas.bound_code(self.bounds[0], self.y)

    @property
    def high(self) -> int:
        """Largest code that the fused activation lets pass."""
        return formulas.bound_code(self.bounds[1], self.y)

    @property
    def is_arithmetic(self) -> bool:
        """False for what moves codes only: such a layer may be part of another or of none."""
        return self.op not in ("Pad", "Reshape", "Transpose")


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network of INT8 layers, in order."""

    input: str
    x: Quantization
    input_shape: tuple[int, ...]
    output: str
    steps: tuple[Step, ...]

    def quantization(self, name: str) -> Quantization:
        """Of a tensor."""
        return self.x if name == self.input else next(s.y for s in self.steps if s.name == name)


@dataclass
class _Draft:
    """A layer before its scales: what was merged so far."""

    op: str
    inputs: tuple[str, ...]
    fields: Mapping[str, Any]
    shape: tuple[int, ...]
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    low: float = -math.inf
    high: float = math.inf
    pads: tuple[int, ...] = ()
    takes_affines: bool = field(default=False)

    @property
    def is_clamped(self) -> bool:
        return (self.low, self.high) != (-math.inf, math.inf)


def quantize(network: FloatNetwork, ranges: Ranges, rules: Rules) -> QuantizedNetwork:
    """Folds, fuses and quantizes.

    Args:
        network: as it was read.
        ranges: (min, max) by value name.
        rules: of the profile.

    Raises:
        NotImplementedError: what this second opinion has no opinion on.
    """
    drafts: dict[str, _Draft] = {}
    for node in network.nodes:
        draft = _merged(node, drafts, network) or _draft(node, network)
        drafts[node.output] = draft
    known = {network.input: formulas.activation(*ranges[network.input])}
    steps = []
    for name, draft in drafts.items():
        x = known[draft.inputs[0]]
        keeps = draft.op in _KEEPS_QUANTIZATION or (draft.op == "AveragePool" and rules.pools_keep_scale)
        known[name] = x if keeps else formulas.activation(*ranges[name])
        weights = None
        if draft.weight is not None:
            assert draft.bias is not None
            weights = formulas.weights(draft.weight, draft.bias, x, known[name], rules.per_channel)
        bounds = (draft.low, draft.high)
        steps.append(
            Step(
                draft.op,
                name,
                draft.inputs,
                draft.fields,
                known[name],
                bounds,
                draft.shape,
                weights,
                draft.pads,
            )
        )
    shape = network.shapes[network.input]
    return QuantizedNetwork(network.input, known[network.input], shape, network.output, tuple(steps))


def _merged(node: Node, drafts: dict[str, _Draft], network: FloatNetwork) -> _Draft | None:
    """The layer before, with this node in it; None where the node begins a layer of its own."""
    before = drafts.get(node.inputs[0])
    if before is None or network.uses[node.inputs[0]] > 1:
        return None
    bounds = _bounds(node)
    if bounds is not None:
        if not (before.op in _WEIGHTED or before.op in _PAIRS):
            return None
        if before.is_clamped:
            raise NotImplementedError("two activations in a row are a table")
        before.low, before.high = bounds
    else:
        affine = _affine(node, network.shapes[node.output])
        if affine is None or not before.takes_affines or before.is_clamped:
            return None
        assert before.weight is not None
        before.weight, before.bias = formulas.fold(before.weight, before.bias, *affine)
    before.shape = network.shapes[node.output]
    del drafts[node.inputs[0]]
    return before


def _draft(node: Node, network: FloatNetwork) -> _Draft:
    shape = network.shapes[node.output]
    draft = _Draft(node.op, node.inputs, node.fields, shape)
    bounds, affine = _bounds(node), _affine(node, shape)
    if bounds is not None:
        draft.op, (draft.low, draft.high) = "Clamp", bounds
    elif node.op in ("Conv", "ConvTranspose"):
        weight = node.constants[1]
        if node.op == "ConvTranspose":
            weight = formulas.as_convolution(weight, node.fields.get("group", 1))
        draft.weight, draft.bias = weight, node.constants.get(2, np.zeros(len(weight), np.float32))
        draft.takes_affines = True
    elif node.op in ("Gemm", "MatMul") and len(node.inputs) == 1:
        draft.op, draft.takes_affines = "Gemm", True
        draft.weight, draft.bias = _matrix(node)
    elif affine is not None:
        # One weight a channel: a depthwise convolution of one pixel.
        draft.op, draft.fields = "Conv", {"group": shape[1], "kernel_shape": [1, 1]}
        ones = np.ones((shape[1], 1, 1, 1), np.float32)
        draft.weight, draft.bias = formulas.fold(ones, np.zeros(shape[1], np.float32), *affine)
    elif node.op in _RESHAPES:
        draft.op = "Reshape"
    elif node.op in _MEANS:
        draft.op = "Mean"
        if node.op == "ReduceMean" and {int(a) % 4 for a in _axes(node)} != {2, 3}:
            raise NotImplementedError(f"a mean over axes {_axes(node)}")
    elif node.op == "Pad":
        draft.pads = tuple(int(n) for n in node.constants[1])
    elif node.op not in (*_PAIRS, "Concat", "MaxPool", "AveragePool", "Transpose"):
        raise NotImplementedError(f"operator {node.op}")
    return draft


def _axes(node: Node) -> list[int]:
    return list(node.constants[1]) if 1 in node.constants else list(node.fields["axes"])


def _bounds(node: Node) -> tuple[float, float] | None:
    """What an activation clamps to; None of another node."""
    if node.op == "Relu":
        return 0.0, math.inf
    if node.op == "Clip":
        low, high = (node.constants.get(index) for index in (1, 2))
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return None


def _affine(node: Node, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Factor and summand of each channel (images: axis 1, rows: the last); None of another node."""
    if node.op == "BatchNormalization":
        constants = [node.constants[index] for index in (1, 2, 3, 4)]
        return formulas.batch_norm(*constants, node.fields.get("epsilon", 1e-5))
    if node.op not in (*_PAIRS, "Div") or len(node.inputs) > 1:
        return None
    position, value = next(iter(node.constants.items()))
    axis = len(shape) - 1 if len(shape) == 2 else len(shape) - 3
    wide = value.reshape([1] * (len(shape) - value.ndim) + list(value.shape))
    if any(n > 1 for i, n in enumerate(wide.shape) if i != axis):
        raise NotImplementedError(f"a constant of shape {value.shape}")
    channels = np.broadcast_to(wide.reshape(-1), (shape[axis],)).astype(np.float32)
    one, zero = np.ones_like(channels), np.zeros_like(channels)
    if node.op == "Div":
        return one / channels, zero
    if node.op == "Mul":
        return channels, zero
    if node.op == "Add":
        return one, channels
    return (one, -channels) if position == 1 else (-one, channels)


def _matrix(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Weight (out, in) and bias (out,) of Gemm or of MatMul by a constant."""
    weight = node.constants[1] if node.fields.get("transB", 0) else node.constants[1].T
    weight = weight * np.float32(node.fields.get("alpha", 1.0))
    bias = node.constants.get(2, np.zeros(1, np.float32)) * np.float32(node.fields.get("beta", 1.0))
    return weight, np.broadcast_to(bias.reshape(-1), (len(weight),)).astype(np.float32)
