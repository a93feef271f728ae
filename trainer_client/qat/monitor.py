"""A word when activations have left their calibrated ranges, which would otherwise train on in silence."""

import warnings
from collections.abc import Mapping

from trainer_client.qat.inject import MISMATCH_LIMIT_LSB
from trainer_client.qat.noise import LayerNoise

_WINDOW_STEPS = 20
_SHARE = 0.01
_FEWEST = 32  # clipped elements; a share of fewer says nothing


class SaturationMonitor:
    """Watches the share of clipped elements over some steps, and warns once.

    A layer counts that clips more than 1 % of its elements and loses more than the mismatch that gradients
    pass: an output that merely reaches the end of its codes, as a sigmoid's does, loses less.

    Args:
        modules: path of the user's module, by value name.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = modules
        self._steps = 0
        self._window: dict[str, LayerNoise] = {}
        self._warned = False

    def add(self, layers: Mapping[str, LayerNoise]) -> None:
        """Takes the noise of one training step."""
        if self._warned:
            return
        if self._steps == _WINDOW_STEPS:
            self._steps, self._window = 0, {}
        self._steps += 1
        for name, noise in layers.items():
            self._window[name] = self._window[name] + noise if name in self._window else noise
        outside = [
            f"{self._modules.get(name) or 'model'} ({name}, {100 * noise.saturated_share:.0f} %)"
            for name, noise in self._window.items()
            if noise.saturated >= _FEWEST
            and noise.saturated_share > _SHARE
            and noise.max_noise_lsb > MISMATCH_LIMIT_LSB
        ]
        if outside:
            self._warned = True
            warnings.warn(
                f"activations have left their calibrated ranges and are clipped, without a gradient: "
                f"{', '.join(outside)}. Measure the ranges again with qat.recalibrate(loader); "
                "print(qat.noise) shows every layer.",
                stacklevel=2,
            )
