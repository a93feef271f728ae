"""The quantization noise of each layer: the NPU's value against the FP32 value of the same inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerNoise:
    """Noise of one INT8 tensor, summed over elements; add two to join their elements.

    n = dequantize(q) - y, where y is the FP32 layer on the NPU's own inputs.

    Attributes:
        elements: number of elements.
        signal_energy: sum of y^2.
        noise_energy: sum of n^2.
        abs_noise_lsb: sum of |n| / scale.
        max_noise_lsb: largest |n| / scale.
        masked: elements whose gradient is withheld because the mismatch is too large or the code is clipped.
        saturated: elements whose code is clipped.
    """

    elements: int
    signal_energy: float
    noise_energy: float
    abs_noise_lsb: float
    max_noise_lsb: float
    masked: int
    saturated: int

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB; inf without noise, nan without a signal."""
        if self.noise_energy == 0.0:
            return math.inf if self.signal_energy > 0.0 else math.nan
        if self.signal_energy == 0.0:
            return -math.inf
        return 10.0 * math.log10(self.signal_energy / self.noise_energy)

    @property
    def mean_noise_lsb(self) -> float:
        """Mean |n| in LSB."""
        return self.abs_noise_lsb / self.elements

    @property
    def masked_share(self) -> float:
        """Share of elements whose gradient is withheld, in [0, 1]."""
        return self.masked / self.elements

    @property
    def mismatched_share(self) -> float:
        """Share of elements far off though the code is not clipped: an accumulator overflowed, say."""
        return (self.masked - self.saturated) / self.elements

    @property
    def saturated_share(self) -> float:
        """Share of elements whose code is clipped, in [0, 1]."""
        return self.saturated / self.elements

    def __add__(self, other: "LayerNoise") -> "LayerNoise":
        return LayerNoise(
            elements=self.elements + other.elements,
            signal_energy=self.signal_energy + other.signal_energy,
            noise_energy=self.noise_energy + other.noise_energy,
            abs_noise_lsb=self.abs_noise_lsb + other.abs_noise_lsb,
            max_noise_lsb=max(self.max_noise_lsb, other.max_noise_lsb),
            masked=self.masked + other.masked,
            saturated=self.saturated + other.saturated,
        )


@dataclass(frozen=True)
class NoiseReport:
    """Noise of every layer over some training steps.

    Attributes:
        steps: number of forward passes in training mode.
        layers: noise by ONNX value name, the model's input included, in the order of execution.
        fresh: layers whose noise was injected, summed over the steps.
        without_noise: layers that trained in FP32 because the training graph has no value of their name,
            summed over the steps. Layers that only move data are in neither number: they add no noise of
            their own.
        modules: path of the user's module that computes a layer, by ONNX value name; "" for the model itself.
    """

    steps: int = 0
    layers: Mapping[str, LayerNoise] = field(default_factory=dict)
    fresh: int = 0
    without_noise: int = 0
    modules: Mapping[str, str] = field(default_factory=dict)

    def __add__(self, other: "NoiseReport") -> "NoiseReport":
        layers = dict(self.layers)
        for name, noise in other.layers.items():
            layers[name] = layers[name] + noise if name in layers else noise
        return NoiseReport(
            steps=self.steps + other.steps,
            layers=layers,
            fresh=self.fresh + other.fresh,
            without_noise=self.without_noise + other.without_noise,
            modules={**self.modules, **other.modules},
        )

    def __str__(self) -> str:
        """A table with a row for each layer."""
        rows = [("module", "value", "SQNR dB", "noise LSB", "max LSB", "saturated %", "mismatched %")]
        rows += [
            (
                self.modules.get(name, ""),
                name,
                f"{noise.sqnr_db:.1f}",
                f"{noise.mean_noise_lsb:.2f}",
                f"{noise.max_noise_lsb:.1f}",
                f"{100 * noise.saturated_share:.2f}",
                f"{100 * noise.mismatched_share:.2f}",
            )
            for name, noise in self.layers.items()
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if position < 2 else cell.rjust(width)
                for position, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([f"noise of {self.steps} training steps", *lines])
