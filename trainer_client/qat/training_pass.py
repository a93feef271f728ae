"""The forward pass in training mode: the FP32 graph, each layer's value replaced by the NPU's."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trainer_client.qat.compiled import Compiled
from trainer_client.qat.inject import inject, rule_of_layer, rule_of_tensor
from trainer_client.qat.noise import LayerNoise
from trainer_client.qat.signature import Call
from trainer_client.qat.tail import in_one_order, seen_by_tail
from trainer_client.qat.trace import Fp32Timing


class TrainingPass:
    """One batch; the `TapContext` of its tapped graph. To make it starts the NPU, with the weights of now.

    Args:
        compiled: the model.
        call: a batch of at most as many samples as the NPU takes at once.

    Attributes:
        pending: the batch on the NPU.
        noise: of each quantized input and tapped layer, by value name.
        timings: of each tapped layer.
    """

    def __init__(self, compiled: Compiled, call: Call) -> None:
        self._compiled = compiled
        self._call = call
        self._inputs = compiled.inputs_of(call, 0, call.samples)
        self.pending = compiled.submit(self._inputs)
        self.noise: dict[str, LayerNoise] = {}
        self.timings: list[Fp32Timing] = []
        self._mark_ns = time.monotonic_ns()

    def outputs(self) -> Sequence[Any]:
        """Runs the FP32 graph beside the NPU; the outputs of the graph, flat."""
        captured, tapped = self._compiled.captured, self._compiled.tapped
        leaves = self._inject_inputs()
        values = tapped.module(self, *leaves)
        seen = [self.value(leaves[captured.inputs[name]]) for name in seen_by_tail(self._compiled.layer_map)]
        outputs = tapped.tail(captured, *in_one_order([*values, *seen]), *self._call.leaves)
        return cast(Sequence[Any], outputs)

    def value(self, x: Any) -> Any:
        """The real numbers of what stands for an input or a layer in the graph: here, itself."""
        return x

    def tensor(self, name: str) -> Tensor:
        """The live parameter, buffer or constant of that name."""
        return self._compiled.captured.tensor(name)

    def inject(self, value: Tensor, layer: int, lower: float, upper: float, overwrite: bool) -> Tensor:
        """Waits for the NPU's tensor of a layer and puts it in the place of the FP32 value."""
        start_ns, end_ns = self._mark_ns, time.monotonic_ns()
        codes = self.pending.tensor(layer)
        tensor_ns = time.monotonic_ns()
        spec = self._compiled.layer_map.layers[layer]
        injected, self.noise[spec.name] = inject(value, codes, rule_of_layer(spec, lower, upper), overwrite)
        self._mark_ns = time.monotonic_ns()
        self.timings.append(Fp32Timing(layer, start_ns, end_ns, tensor_ns, self._mark_ns))
        return injected

    def _inject_inputs(self) -> list[Any]:
        """The inputs as the NPU sees them, images channels-last; the FP32 layers keep that order.

        It is the faster order on a CPU, and the same for every NPU: FP32 rounding depends on it, and training
        against two NPUs of equal bits must give equal weights. Codes in another order are brought to it.
        """
        leaves = list(self._call.leaves)
        for spec in self._compiled.layer_map.quantized_inputs:
            position = self._compiled.captured.inputs[spec.name]
            x = leaves[position]
            if x.ndim == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            leaves[position], self.noise[spec.name] = inject(x, self._inputs[spec.name], rule_of_tensor(spec))
        self._mark_ns = time.monotonic_ns()
        return leaves
