"""One network under one profile: what compiles, what is equal, what is injected, what trains."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from npu_wire.layer_map import Int8Array, LayerMap, LayerSpec
from npu_wire.quantize import dequantize
from trainer_client.qat.module import QatModule, prepare
from trainer_client.qat.noise import LayerNoise
from trainer_client.qat.taps import tap

from .catalogue import BATCH, Architecture
from .side_by_side import SHARED, SideBySideNpu

CALIBRATION_SAMPLES = 48


@dataclass(frozen=True)
class LayerResult:
    """One layer of the layer map.

    Attributes:
        spec: its line in the layer map.
        elements: INT8 numbers of the layer.
        mismatches: how many of them differ.
        noise: against the FP32 layer on the NPU's own inputs; None where nothing was injected.
    """

    spec: LayerSpec
    elements: int
    mismatches: int
    noise: LayerNoise | None

    @property
    def shared(self) -> bool:
        """Whether both backends call the same function."""
        return self.spec.host_float or self.spec.op in SHARED


@dataclass(frozen=True)
class Gradients:
    """Of one training step.

    Attributes:
        parameters: tensors that require a gradient.
        without: names of those that got none.
        not_finite: names of those whose gradient holds NaN or infinity.
        zero: names of those whose gradient is 0 throughout.
    """

    parameters: int
    without: tuple[str, ...]
    not_finite: tuple[str, ...]
    zero: tuple[str, ...]


@dataclass(frozen=True)
class Examination:
    """What came of a network under a profile.

    Attributes:
        architecture: the network.
        profile: the arithmetic.
        weights: float numbers that the model holds as parameters.
        layers: in the order of execution.
        missing: layers that add noise but have no value of their name in the training graph.
        output_sqnr_db: of the whole network's INT8 output against the float network's.
        gradients: of one training step.
        model: ONNX bytes that were compiled.
        ranges: that it was compiled with.
        input_codes: the batch of the training step, int8.
    """

    architecture: Architecture
    profile: str
    weights: int
    layers: tuple[LayerResult, ...]
    missing: tuple[str, ...]
    output_sqnr_db: float
    gradients: Gradients
    model: bytes
    ranges: dict[str, tuple[float, float]]
    input_codes: Int8Array

    @property
    def elements(self) -> int:
        """INT8 numbers that each backend computes with code of its own."""
        return sum(layer.elements for layer in self.layers if not layer.shared)

    @property
    def mismatches(self) -> int:
        """INT8 numbers that differ between reference and emulator."""
        return sum(layer.mismatches for layer in self.layers)

    @property
    def arithmetic(self) -> list[LayerResult]:
        """Layers that compute on the NPU, neither moving data only nor on the host."""
        return [layer for layer in self.layers if not (layer.spec.moves_data_only or layer.spec.host_float)]

    @property
    def noisy(self) -> list[tuple[str, LayerNoise]]:
        """Name and noise of every layer that was injected, but for those without a signal."""
        found = [(layer.spec.name, layer.noise) for layer in self.layers if layer.noise is not None]
        return [(name, noise) for name, noise in found if noise.signal_energy > 0]


class Prepared:
    """A network that is captured and calibrated once and examined under several profiles."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.model = architecture.model()
        rng = np.random.default_rng(0)
        self.calibration = architecture.inputs(CALIBRATION_SAMPLES, rng)
        self.batch = architecture.inputs(BATCH, rng)
        self._qat: QatModule | None = None

    def examine(self, profile: str) -> Examination:
        """Compiles, compares, and takes a training step.

        Raises:
            UnsupportedModel: the profile refuses the network.
        """
        npu = SideBySideNpu(profile)
        qat = self._prepare(npu)
        qat.train()
        self.model.zero_grad()
        output = qat(self.batch)
        # Fixed random weights: a plain sum has no gradient behind a softmax or a norm.
        torch.manual_seed(2)
        (output * torch.randn_like(output)).sum().backward()
        layer_map, noise = qat.layer_map, qat.noise.layers
        assert npu.comparison.batch is not None
        results = tuple(
            LayerResult(spec, npu.comparison.elements[i], npu.comparison.mismatches[i], noise.get(spec.name))
            for i, spec in enumerate(layer_map.layers)
        )
        return Examination(
            self.architecture,
            profile,
            sum(p.numel() for p in self.model.parameters()),
            results,
            _missing(qat),
            self._output_sqnr_db(layer_map, npu),
            self._gradients(),
            npu.model,
            npu.ranges,
            npu.comparison.batch,
        )

    def _prepare(self, npu: SideBySideNpu) -> QatModule:
        if self._qat is None:
            qat = prepare(self.model, self.batch, npu)
            qat.calibrate(self.calibration)
            self._qat = qat
            return qat
        return QatModule(self._qat._captured, npu, ranges=self._qat.ranges)

    def _output_sqnr_db(self, layer_map: LayerMap, npu: SideBySideNpu) -> float:
        spec = layer_map.tensors[layer_map.outputs[0]]
        with torch.no_grad():
            expected = self.model.eval()(self.batch).numpy().astype(np.float64).reshape(-1)
        codes = npu.comparison.last[len(layer_map.layers) - 1]
        noise = dequantize(codes, spec.scale, spec.zero_point).astype(np.float64).reshape(-1) - expected
        return 10 * math.log10(np.square(expected).sum() / np.square(noise).sum())

    def _gradients(self) -> Gradients:
        wanted = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        got = {name: grad for name, grad in wanted.items() if grad is not None}
        return Gradients(
            len(wanted),
            tuple(name for name, grad in wanted.items() if grad is None),
            tuple(name for name, grad in got.items() if not bool(torch.isfinite(grad).all())),
            tuple(name for name, grad in got.items() if not bool(grad.any())),
        )


def _missing(qat: QatModule) -> tuple[str, ...]:
    return tap(qat._folded, qat.layer_map).missing
