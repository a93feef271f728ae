"""Operators whose inputs are finite, on all of them: every code, or every pair of codes, at many scales."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from npu_server.numerics.elementwise import CODES
from npu_server.numerics.profile import Profile
from npu_wire.layer_map import Int8Array

from .cases import BITS, Scale, rounded
from .cell import Cell, total
from .exemptions import exemption
from .layers import Job, Judge, Network, Unjudged
from .matrix import compare

Rng = np.random.Generator
_SIDE_BY_SIDE = {False: 64, True: 6}
_NEAR, _FAR = 4, 10
"""How many octaves apart the scales of operands and output are at most: three quarters of them, the rest."""
_EDGES = (-128, -127, -1, 0, 1, 126, 127)


@dataclass(frozen=True)
class Sweep:
    """One operator.

    Attributes:
        op: ONNX operator.
        operands: how many activations it takes.
        pairs: it is judged on every pair of codes, not on every code of each operand.
        output: scale of its output, where the operator has one of its own.
        activation: an ONNX operator that is fused into it.
        attributes: of its node.
    """

    op: str
    operands: int = 1
    pairs: bool = False
    output: Scale | None = None
    activation: str = ""
    attributes: tuple[tuple[str, object], ...] = ()


SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "add": (Sweep("Add", 2, True), Sweep("Add", 2, True, activation="Relu")),
    "sub": (Sweep("Sub", 2, True),),
    "mul": (Sweep("Mul", 2, True), Sweep("Mul", 2, True, activation="Clip")),
    "max and min": (Sweep("Max", 2, True), Sweep("Min", 2, True)),
    "concat": (Sweep("Concat", 2, attributes=(("axis", 1),)),),
    "relu": (Sweep("Relu"), Sweep("Clip")),
    "sigmoid": (Sweep("Sigmoid", output=Scale(1 / 256, -128)),),
    "tanh": (Sweep("Tanh", output=Scale(1 / 128, 0)),),
    "leaky relu": tuple(
        Sweep("LeakyRelu", attributes=(("alpha", alpha),)) for alpha in (0.01, 0.1, 0.25, 0.3, 0.9, 1.5)
    ),
    "hard swish": (Sweep("HardSwish"),),
}
"""Row of the matrix -> what is swept for it."""


def judge_sweeps(subject: str, profile: Profile, judge: Judge, configurations: int, seed: int = 0) -> Cell:
    """Judges an operator on all of its inputs.

    Args:
        subject: of `SWEEPS`.
        profile: the arithmetic.
        judge: the engine.
        configurations: how many scales and zero points, for all of the subject's sweeps together.
        seed: of the scales.
    """
    sweeps, cells = SWEEPS[subject], []
    for index, sweep in enumerate(sweeps):
        rng = np.random.default_rng([seed, index])
        cells += _judge(sweep, profile, judge, -(-configurations // len(sweeps)), rng)
    return total(subject, cells)


def judge_at(sweep: Sweep, scales: Mapping[str, Scale], profile: Profile, judge: Judge) -> Cell:
    """Judges a sweep's operator on all of its inputs at given scales.

    Args:
        sweep: the operator.
        scales: of "x", or of "a" and "b", and of "y".
        profile: the arithmetic.
        judge: the engine.
    """
    inputs = _inputs(sweep, odd=False)
    ranges = {"x": Scale(1.0, 0).range} | {name: scale.range for name, scale in scales.items()}
    judged = Network(_model(sweep, inputs)).last_layer(ranges, profile)
    return compare(judged, inputs, judge, profile, exhausted=1)


def _judge(sweep: Sweep, profile: Profile, judge: Judge, configurations: int, rng: Rng) -> Iterator[Cell]:
    inputs = [_inputs(sweep, odd) for odd in (False, True)]
    networks = [Network(_model(sweep, arrays)) for arrays in inputs]
    jobs: list[Job] = []
    for index in range(configurations):
        odd = index % 8 == 7
        judged = networks[odd].last_layer(_scales(sweep, rng), profile)
        why = exemption(judged, inputs[odd], profile)
        if why:
            yield Cell(sweep.op, refusals={f"not claimed: {why}": 1})
        else:
            jobs.append((judged, inputs[odd]))
        if len(jobs) == _SIDE_BY_SIDE[sweep.pairs] or index == configurations - 1:
            for job, answer in zip(jobs, _answers(judge, jobs), strict=True):
                if isinstance(answer, str):
                    yield Cell(sweep.op, refusals={answer: 1})
                else:
                    yield compare(*job, judge, profile, answer, exhausted=1)
            jobs = []


def _answers(judge: Judge, jobs: list[Job]) -> Iterator[Int8Array | str]:
    """What the engine says to each, or why it says nothing; one that it refuses is found by halving."""
    if not jobs:
        return
    try:
        yield from judge.run_all(jobs)
    except Unjudged as refusal:
        if len(jobs) == 1:
            yield str(refusal)
            return
        half = len(jobs) // 2
        yield from _answers(judge, jobs[:half])
        yield from _answers(judge, jobs[half:])


def _inputs(sweep: Sweep, odd: bool) -> list[Int8Array]:
    """Every code or every pair; an odd number of elements has some of them twice."""
    flat = [CODES] * sweep.operands
    if sweep.pairs:
        flat = [grid.reshape(-1) for grid in np.meshgrid(*flat, indexing="ij")]
    if odd:
        order = np.r_[np.arange(flat[0].size), np.random.default_rng(0).permutation(flat[0].size)[:13]]
        return [x[order].reshape(1, 1, 1, -1) for x in flat]
    return [x.reshape(1, 1, 16, -1) for x in flat]


def _model(sweep: Sweep, inputs: list[Int8Array]) -> bytes:
    """The operator alone; operands "a" and "b" of a pair come from layers that are not judged."""
    one = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one")
    bounds = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0), ("six", 6))]
    names = ["a", "b"][: sweep.operands] if sweep.operands > 1 else ["x"]
    nodes = [helper.make_node("Conv", ["x", "one"], [name], f"conv_{name}") for name in names if name != "x"]
    more = ["zero", "six"] if sweep.op == "Clip" else []
    result = "c" if sweep.activation else "y"
    nodes.append(helper.make_node(sweep.op, [*names, *more], [result], "swept", **dict(sweep.attributes)))
    if sweep.activation:
        operands = ["c", "zero", "six"] if sweep.activation == "Clip" else ["c"]
        nodes.append(helper.make_node(sweep.activation, operands, ["y"], "activation"))
    size = ["batch", *inputs[0].shape[1:]]
    graph = helper.make_graph(
        nodes,
        "swept",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "others"])],
        [one, *bounds],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _scales(sweep: Sweep, rng: Rng) -> dict[str, tuple[float, float]]:
    """Ranges that make scales from 2^-12 to 2^4, a third of them powers of two, and outputs around them.

    Another third has mantissas of four bits: 7/16 over 10/16 is a tie at every fifth code.
    """
    bits = int(rng.choice(BITS))

    def scale(low: float, high: float) -> float:
        """Between 2^low and 2^high."""
        return float(np.float32(rounded(2.0 ** rng.uniform(low, high), bits)))

    def zero_point() -> int:
        return int(rng.choice(_EDGES) if rng.random() < 0.5 else rng.integers(-128, 128))

    apart = _FAR if rng.random() < 0.25 and sweep.op != "HardSwish" else _NEAR
    first = scale(-12, 4)
    second = scale(np.log2(first) - apart, np.log2(first) + apart)
    size = max(first, second) if sweep.operands > 1 else first
    size = first * second * 64 if sweep.op == "Mul" else size
    output = sweep.output or Scale(scale(np.log2(size) - apart, np.log2(size) + apart), zero_point())
    entries = {"a": Scale(first, zero_point()), "b": Scale(second, zero_point()), "y": output, "c": output}
    entries["x"] = entries["a"]
    return {name: entry.range for name, entry in entries.items()}
