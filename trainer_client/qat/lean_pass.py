"""The forward pass in training mode without FP32 layers: a layer's value is the NPU's tensor.

FP32 values are computed only to measure: in a full pass every layer's, else those of layers in which a
register may overflow, because there the codes alone do not tell where a gradient would mislead.
"""

import time
from typing import Any

from torch import Tensor

from npu_wire.layer_map import INT8_MAX, INT8_MIN
from trainer_client.qat.codes import Held, codes_of
from trainer_client.qat.compiled import Compiled
from trainer_client.qat.inject import InjectionRule, measure, rule_of_layer, rule_of_tensor
from trainer_client.qat.lean_graph import LeanGraph
from trainer_client.qat.lean_layer import attach, computed, quantized, value_of
from trainer_client.qat.signature import Call
from trainer_client.qat.trace import Fp32Timing
from trainer_client.qat.training_pass import TrainingPass


class LeanPass(TrainingPass):
    """One batch; the context of a `LeanGraph`. To make it starts the NPU, with the weights of now.

    Args:
        compiled: the model, its graph lean.
        call: a batch of at most as many samples as the NPU takes at once.
        full: whether to measure the noise of every layer; it changes no gradient.
    """

    def __init__(self, compiled: Compiled, call: Call, full: bool) -> None:
        super().__init__(compiled, call)
        assert isinstance(compiled.tapped, LeanGraph)
        self._layers = compiled.tapped.layers
        self._full = full

    def layer(self, position: int, *operands: Any) -> Held:
        """Waits for the NPU's tensor of a layer, which is its value."""
        start_ns, lean = self._mark_ns, self._layers[position]
        spec = self._compiled.layer_map.layers[position]
        measured = self._full or not spec.never_overflows
        y = computed(lean, operands) if measured else None
        end_ns = time.monotonic_ns()
        q = self.pending.tensor(position)
        tensor_ns = time.monotonic_ns()
        rule = rule_of_layer(spec, lean.lower, lean.upper)
        codes = codes_of(q, lean.shape(self._call.samples), rule, self._call.device)
        mask = None
        if y is not None:
            mask, self.noise[spec.name] = measure(y, q, rule)
        if not spec.never_overflows:
            held = attach(lean, codes, _as_measured(rule), mask, operands)
        else:
            held = attach(lean, codes, rule, None, operands)
        self._mark_ns = time.monotonic_ns()
        self.timings.append(Fp32Timing(position, start_ns, end_ns, tensor_ns, self._mark_ns))
        return held

    def value(self, x: Any) -> Any:
        """The real numbers of a tensor of the NPU; whatever else it is, the value itself."""
        return value_of(x) if isinstance(x, Held) else x

    def _inject_inputs(self) -> list[Any]:
        leaves = list(self._call.leaves)
        for spec in self._compiled.layer_map.quantized_inputs:
            position = self._compiled.captured.inputs[spec.name]
            x: Tensor = leaves[position]
            rule, q = rule_of_tensor(spec), self._inputs[spec.name]
            if self._full:
                _, self.noise[spec.name] = measure(x.detach().clone(), q, rule)
            leaves[position] = quantized(x, codes_of(q, tuple(x.shape), rule, x.device), rule)
        self._mark_ns = time.monotonic_ns()
        return leaves


def _as_measured(rule: InjectionRule) -> InjectionRule:
    """The rule of a tensor whose mask holds all that stops a gradient; without a mask, all pass."""
    return InjectionRule(rule.scale, rule.zero_point, INT8_MIN - 1, INT8_MAX + 1)
