"""The forward pass in evaluation mode: the NPU computes alone, and what it does not compute follows."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from npu_wire.layer_map import Array, Float32Array, TensorSpec
from npu_wire.quantize import dequantize, quantize
from trainer_client.qat.compiled import Compiled
from trainer_client.qat.signature import Call
from trainer_client.qat.tail import in_one_order, seen_by_tail, shape_at


def evaluate(compiled: Compiled, call: Call, largest: int) -> Sequence[Any]:
    """Runs a call on the NPU with the weights of now.

    Args:
        compiled: the model.
        call: a batch of any size.
        largest: samples that the NPU takes at once.

    Returns:
        The outputs of the graph, flat, without a gradient.

    Raises:
        NpuError: see `QatModule.forward`.
    """
    compiled.push()
    values = [*_output_layers(compiled, call, largest), *_inputs_seen(compiled, call)]
    with torch.no_grad():
        outputs = compiled.tapped.tail(compiled.captured, *in_one_order(values), *call.leaves)
    return cast(Sequence[Any], outputs)


def _output_layers(compiled: Compiled, call: Call, largest: int) -> list[Tensor]:
    layers, cuts = compiled.layer_map.layers, compiled.tapped.cuts
    parts: dict[int, list[Float32Array]] = {position: [] for position in cuts}
    for start in range(0, call.samples, largest):
        inputs = compiled.inputs_of(call, start, min(start + largest, call.samples))
        pending = compiled.session.submit(inputs, ())
        for position, received in parts.items():
            spec = layers[position].output
            received.append(dequantize(pending.tensor(position), spec.scale, spec.zero_point))
    values = []
    for position, node in cuts.items():
        whole = np.concatenate(parts[position])
        outer = layers[position].output.outer
        if outer > 1:
            whole = whole.reshape(call.samples, outer, -1).swapaxes(0, 1)
        values.append(torch.from_numpy(whole.reshape(shape_at(node, call.samples))).to(call.device))
    return values


def _inputs_seen(compiled: Compiled, call: Call) -> list[Tensor]:
    layer_map = compiled.layer_map
    return [
        _as_seen(layer_map.tensors[name], call.leaves[compiled.captured.inputs[name]])
        for name in seen_by_tail(layer_map)
    ]


def _as_seen(spec: TensorSpec, x: Tensor) -> Tensor:
    codes: Array = quantize(x.numpy(force=True), spec.scale, spec.zero_point)
    return torch.from_numpy(dequantize(codes, spec.scale, spec.zero_point)).to(x.device)
