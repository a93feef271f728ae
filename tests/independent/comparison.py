"""The compiled program before the second opinion: every number that both have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from . import product, with_onnxruntime, with_tflm
from .quantizer import QuantizedNetwork, Rules, Step, quantize
from .random_networks import Subject

Engine = Callable[[QuantizedNetwork, np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Judge:
    """An engine with the profile that claims to be it.

    Attributes:
        name: of the engine.
        profile: name.
        run: the whole network in the engine.
        pools_keep_scale: see `Rules`.
        for_tflite: its operators are TFLite's.
    """

    name: str
    profile: str
    run: Engine
    pools_keep_scale: bool = False
    for_tflite: bool = False


ONNX_RUNTIME = Judge("ONNX Runtime", "onnxruntime", with_onnxruntime.run)
TFLM = Judge("TFLM", "tflm", with_tflm.run, pools_keep_scale=True, for_tflite=True)
JUDGES = {judge.name: judge for judge in (ONNX_RUNTIME, TFLM)}


@dataclass(frozen=True)
class Finding:
    """What came of one network.

    Attributes:
        network: its name.
        judge: the engine.
        layers: compared by output.
        elements: outputs of the engine, each compared with every backend's.
        weights: weight and bias codes compared.
        differences: what is not equal, in words; empty is good.
    """

    network: str
    judge: str
    layers: int
    elements: int
    weights: int
    differences: tuple[str, ...]


def judge(subject: Subject, by: Judge, per_channel: bool = True) -> Finding:
    """Compiles a network, quantizes it by the page, runs that in the engine, and compares all there is."""
    network = quantize(subject.float_network, subject.ranges, Rules(per_channel, by.pools_keep_scale))
    arithmetic = product.profile(by.profile, per_channel)
    tensors = by.run(network, subject.codes)
    differences = []
    names: set[str] = set()
    for backend in product.BACKENDS:
        try:
            compiled = product.compile_and_run(
                subject.model, subject.ranges, subject.codes, arithmetic, backend
            )
        except product.NpuError as error:
            differences.append(f"{backend}: refused: {error}")
            continue
        names |= {layer.name for layer in compiled.layers}
        differences += [f"{backend}: {text}" for text in _differences(compiled, network, tensors)]
    compared = [step for step in network.steps if step.name in names]
    return Finding(
        subject.name,
        by.name,
        len(compared),
        sum(tensors[step.name].size for step in compared),
        sum(s.weights.codes.size + s.weights.bias.size for s in compared if s.weights is not None),
        tuple(differences),
    )


def _differences(
    compiled: product.Compiled, network: QuantizedNetwork, tensors: Mapping[str, np.ndarray]
) -> list[str]:
    steps = {step.name: step for step in network.steps}
    found = [] if compiled.x == network.x else [f"input: {compiled.x}, expected {network.x}"]
    names = {layer.name for layer in compiled.layers}
    found += [f"{s.name}: no such layer" for s in network.steps if s.is_arithmetic and s.name not in names]
    for layer in compiled.layers:
        where = f"{layer.name} ({layer.op})"
        if layer.name not in steps:
            found.append(f"{where}: a layer that the page does not know")
            continue
        found += [f"{where}: {text}" for text in _numbers(layer, steps[layer.name])]
        expected = tensors[layer.name]
        if layer.codes.size != expected.size:
            found.append(f"{where}: outputs of shape {layer.codes.shape} for {expected.shape}")
            continue
        wrong = int((layer.codes.reshape(expected.shape) != expected).sum())
        if wrong:
            found.append(f"{where}: {wrong} of {expected.size} outputs")
    return found


def _numbers(layer: product.CompiledLayer, step: Step) -> list[str]:
    """Scales, zero points and codes that differ."""
    found = []
    if layer.y != step.y:
        found.append(f"{layer.y}, expected {step.y}")
    ours, theirs = step.weights, layer.weights
    if (ours is None) != (theirs is None):
        found.append("only one side has weights")
    elif ours is not None and theirs is not None:
        for what in ("scales", "codes", "bias"):
            a, b = getattr(theirs, what), getattr(ours, what)
            wrong = int((a != b.reshape(a.shape)).sum()) if a.size == b.size else max(a.size, b.size)
            if wrong:
                found.append(f"{wrong} of {b.size} weight {what}")
    return found
