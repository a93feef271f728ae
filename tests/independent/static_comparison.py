"""The compiler's numbers before those of ONNX Runtime's `quantize_static`.

What must be equal: the scale of every activation with a range of its own; weight scales and codes; bias
codes. Where the two conventions differ, the difference is bounded and counted:

- `quantize_static` divides by the scale before it is rounded to float32, the compiler by the float32 number:
  a zero point may differ by one where -128 - low / scale is a tie (a range that is symmetric about 0).
- It multiplies input scale and weight scale in float32, the compiler in float64: the compiler's code must be
  the nearest to its real bias, to the 2^-23rd part; codes that are not the same number are counted.
- Its optimizer folds batch norm in another order of float32 operations: scales may differ in the last bits,
  codes of weights and biases by one.
- Where weights are next to nothing beside the bias, the scale follows the bias: it fills 32 bits there, 31
  here. Such channels are counted and not compared.
- A channel of zeros gets the scale 1 there, output scale / input scale here; its codes are zeros in both.
- Average pools keep the input's scale there, and so does what follows them.
"""

from dataclasses import dataclass

import numpy as np

from . import product, with_quantize_static
from .formulas import Quantization
from .random_networks import Subject
from .reading import write
from .with_quantize_static import StaticWeights

_OWN_RANGE = ("Conv", "Gemm", "Add", "Mul", "Concat", "Mean", "Relu")
_ULP = 2.0**-23


@dataclass(frozen=True)
class StaticFinding:
    """What came of one network.

    Attributes:
        network: its name.
        tensors: activations whose scale and zero point were compared.
        ties: of these, zero points that differ by one at a tie.
        channels: weight scales compared.
        bias_bound: channels whose scale follows the bias.
        codes: weight codes compared.
        off_codes: of these, such as differ by one because batch norm was folded in another order.
        biases: bias codes compared.
        off_biases: of these, such as differ within the float32 product of scales.
        differences: what is not equal and should be, in words.
    """

    network: str
    tensors: int
    ties: int
    channels: int
    bias_bound: int
    codes: int
    off_codes: int
    biases: int
    off_biases: int
    differences: tuple[str, ...]


class _Counts:
    def __init__(self) -> None:
        self.tensors = self.ties = self.channels = self.bias_bound = self.codes = self.off_codes = 0
        self.biases = self.off_biases = 0
        self.differences: list[str] = []


def judge_static(subject: Subject, per_channel: bool = True) -> StaticFinding:
    """Compiles a network for the profile `onnxruntime`, has ONNX Runtime quantize it, compares."""
    arithmetic = product.profile("onnxruntime", per_channel)
    compiled = product.compile_and_run(subject.model, subject.ranges, subject.codes, arithmetic, "reference")
    static = with_quantize_static.quantize(write(subject.float_network), subject.ranges, per_channel)
    counts = _Counts()
    known = {compiled.input: compiled.x} | {layer.name: layer.y for layer in compiled.layers}
    for name in [compiled.input, *(layer.name for layer in compiled.layers if layer.op in _OWN_RANGE)]:
        if name in static.tensors:
            _compare_tensor(counts, name, known[name], static.tensors[name], subject.ranges[name])
    for layer in compiled.layers:
        if layer.weights is not None and layer.name in static.weights:
            x = known[layer.inputs[0]]
            same_input = static.tensors.get(layer.inputs[0]) == x
            _compare_weights(counts, layer, x, static.weights[layer.name], same_input)
    return StaticFinding(subject.name, **(vars(counts) | {"differences": tuple(counts.differences)}))


def _compare_tensor(
    counts: _Counts, name: str, ours: Quantization, theirs: Quantization, span: tuple[float, float]
) -> None:
    counts.tensors += 1
    if ours == theirs:
        return
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    exact = -128 - low / ((high - low) / 255)
    is_tie = abs(abs(exact) % 1 - 0.5) < 255 * _ULP
    if ours.scale == theirs.scale and is_tie and abs(ours.zero_point - theirs.zero_point) == 1:
        counts.ties += 1
    else:
        counts.differences.append(f"{name}: {ours}, quantize_static says {theirs}")


def _compare_weights(
    counts: _Counts, layer: product.CompiledLayer, x: Quantization, static: StaticWeights, same_input: bool
) -> None:
    ours, theirs = layer.weights, static.quantized
    assert ours is not None
    out = len(ours.codes)
    rows, their_rows = ours.codes.reshape(out, -1).astype(int), theirs.codes.reshape(out, -1).astype(int)
    bound = np.abs(ours.bias) > 0.999 * 2**30
    if len(set(ours.scales)) == 1 and bound.any():
        bound[:] = True
    counts.bias_bound += int(bound.sum())
    live = rows.any(axis=1) & ~bound
    rows, their_rows = rows[~bound], their_rows[~bound]
    counts.channels += int((~bound).sum())
    counts.codes += rows.size
    folded = 0 if static.is_unfolded else 1
    off_scales = np.abs(theirs.scales - ours.scales)[live] > folded * 8 * _ULP * ours.scales[live]
    off_codes = np.abs(rows - their_rows)
    counts.off_codes += int((off_codes > 0).sum())
    found = [f"{n} weight scales" for n in [int(off_scales.sum())] if n]
    found += [f"{n} weight codes" for n in [int((off_codes > folded).sum())] if n]
    if same_input:
        counts.biases += int(live.sum())
        off = np.abs(ours.bias - theirs.bias)[live]
        counts.off_biases += int((off > 0).sum())
        steps = static.bias[live] / (ours.scales[live].astype(np.float64) * float(x.scale))
        if static.is_unfolded:
            wrong = np.abs(ours.bias[live] - steps) > 0.5 + _ULP * np.abs(steps)
        else:
            wrong = off > 1 + 4 * _ULP * np.abs(steps)
        found += [f"{n} bias codes" for n in [int(wrong.sum())] if n]
    counts.differences += [f"{layer.name} ({layer.op}): {text}" for text in found]
