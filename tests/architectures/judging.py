"""A whole network before an engine that nobody here wrote: each layer on the engine's own input."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from judges.exemptions import exemption, operator_of
from judges.layers import Judge, Unjudged, compile_layers, our_outputs

from npu_server.compile import graph as g
from npu_server.numerics.profile import load_profile
from npu_wire.layer_map import Int8Array


@dataclass(frozen=True)
class Verdict:
    """What an engine says about a network.

    Attributes:
        judge: the engine.
        layers: how many it computed itself.
        elements: outputs that were compared.
        mismatches: outputs where reference or emulator differ from the engine.
        wrong: names of the layers with a mismatch.
        unjudged: operator -> why the engine has nothing to say about it.
    """

    judge: str
    layers: int
    elements: int
    mismatches: int
    wrong: tuple[str, ...]
    unjudged: Mapping[str, str]


def judge_network(
    judge: Judge, model: bytes, ranges: Mapping[str, tuple[float, float]], profile: str, batch: Int8Array
) -> Verdict:
    """Runs a network layer by layer in the engine; what it cannot compute, `reference` does.

    Args:
        judge: the engine.
        model: ONNX bytes.
        ranges: activation ranges by value name.
        profile: name of the profile that bears the engine's name.
        batch: int8 input, (n, ...).
    """
    arithmetic = load_profile(profile)
    values: dict[str, Int8Array] = {}
    layers = elements = mismatches = 0
    wrong: list[str] = []
    unjudged: dict[str, str] = {}
    for judged in compile_layers(model, ranges, arithmetic):
        # What no layer has yielded is the input, of which these networks have one.
        inputs = [values.get(source, batch) for source in judged.layer.spec.inputs]
        ours = our_outputs(judged, inputs, arithmetic)
        spec = judged.layer.spec
        try:
            if operator_of(judged) in arithmetic.unjudged:
                raise Unjudged(f"profile {profile} claims nothing about {operator_of(judged)}")
            if exempt := exemption(judged, inputs, arithmetic):
                raise Unjudged(f"profile {profile} does not claim {exempt}")
            windowed = isinstance(judged.layer.operator, g.Conv | g.MaxPool | g.AveragePool)
            if judge.name == "ONNX Runtime" and windowed and len(judged.layer.shape) == 2:
                raise Unjudged("the harness authors no sequences for ONNX Runtime")
            expected = judge.run(judged, inputs)
        except Unjudged as reason:
            unjudged.setdefault(spec.op, str(reason))
            values[spec.name] = ours[0]
            continue
        differs = np.logical_or.reduce([output != expected for output in ours])
        layers, elements, mismatches = layers + 1, elements + expected.size, mismatches + int(differs.sum())
        if differs.any():
            wrong.append(spec.name)
        values[spec.name] = expected
    return Verdict(judge.name, layers, elements, mismatches, tuple(wrong), unjudged)
