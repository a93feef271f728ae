"""Honesty of a layer map: what it says about each tensor is compared with the tensors."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from npu_wire.layer_map import INT8_MAX, INT8_MIN, Array, Int8Array, LayerMap, LayerSpec, TensorSpec

_LINEAR = ("Conv", "Gemm", "Add", "Sub", "MatMul")
"""Operators that only the ends of INT8 bound."""


def violations(
    layer_map: LayerMap, inputs: Mapping[str, Array], outputs: Mapping[str, Int8Array]
) -> Iterator[str]:
    """Tells each thing in a layer map that is illegal or that the tensors contradict.

    Args:
        layer_map: of the program.
        inputs: what it was run on, by name.
        outputs: every layer's output by name.
    """
    if not layer_map.layers:
        yield "the layer map has no layers"
        return
    known = {spec.name: (spec, inputs[spec.name]) for spec in layer_map.quantized_inputs}
    raw = inputs.keys() - known.keys()
    samples = next(len(inputs[x.name]) for x in layer_map.inputs if isinstance(x, TensorSpec) or x.batched)
    for spec in layer_map.quantized_inputs:
        yield from _illegal(spec)
    for name in layer_map.outputs:
        if name not in layer_map.tensors:
            yield f"the layer map names the output '{name}', which is none of its tensors"
    for layer in layer_map.layers:
        spec = layer.output
        if spec.name in known:
            yield f"the layer map has '{spec.name}' twice"
        yield from _illegal(spec)
        unknown = [name for name in layer.inputs if name not in known and name not in raw]
        if unknown:
            yield f"layer '{spec.name}' reads '{unknown[0]}', which nothing before it yields"
        tensor = outputs.get(spec.name)
        if tensor is None:
            yield f"layer '{spec.name}' was tapped and not yielded"
            continue
        expected = (samples, *spec.shape)
        if tensor.dtype != np.int8 or tensor.shape != expected:
            yield f"'{spec.name}' is {tensor.dtype} {tensor.shape}; its layer map promises int8 {expected}"
        elif not unknown:
            yield from _saturation(layer, tensor)
            if layer.moves_data_only:
                yield from _movement(layer, tensor, [known[name] for name in layer.inputs])
        known[spec.name] = (spec, tensor)


def _illegal(spec: TensorSpec) -> Iterator[str]:
    if not (math.isfinite(spec.scale) and spec.scale > 0):
        yield f"'{spec.name}' has scale {spec.scale}; it must be a finite number > 0"
    if not INT8_MIN <= spec.zero_point <= INT8_MAX:
        yield f"'{spec.name}' has zero point {spec.zero_point}; legal are {INT8_MIN} to {INT8_MAX}"
    if any(size < 1 for size in spec.shape):
        yield f"'{spec.name}' has shape {spec.shape}; sizes are 1 or more"


def _saturation(layer: LayerSpec, tensor: Int8Array) -> Iterator[str]:
    """A layer without an activation clips at the ends of INT8, unless real 0 is there."""
    low, high, zero = layer.saturation_low, layer.saturation_high, layer.output.zero_point
    if not (INT8_MIN - 1 <= low < high <= INT8_MAX + 1):
        yield f"'{layer.name}' has saturation bounds {low} and {high}; legal are -129 to 128, low < high"
        return
    if layer.op not in _LINEAR or len(layer.fused_nodes) != 1:
        return
    ends = ((INT8_MIN, low < INT8_MIN, "saturation_low"), (INT8_MAX, high > INT8_MAX, "saturation_high"))
    for end, denied, key in ends:
        if denied and zero != end and bool((tensor == end).any()):
            yield f"'{layer.name}' reaches {end}, but its {key} says that nothing clips there"


def _movement(
    layer: LayerSpec, tensor: Int8Array, sources: list[tuple[TensorSpec, Int8Array]]
) -> Iterator[str]:
    """What only moves data keeps scale and zero point, and yields no code that it did not get."""
    spec = layer.output
    for source, _ in sources:
        if (source.scale, source.zero_point) != (spec.scale, spec.zero_point):
            yield f"'{spec.name}' only moves data, but its scale or zero point is not that of '{source.name}'"
    got = set(np.unique(tensor).tolist()) - {spec.zero_point}  # padding is real 0
    for _, values in sources:
        got -= set(np.unique(values).tolist())
    if got:
        yield f"'{spec.name}' only moves data, but yields code {min(got)}, which is in none of its inputs"
