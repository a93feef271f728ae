"""ONNX models that nobody means well with: each must be refused with a clear error, or compile."""

from collections.abc import Callable, Iterator

import onnx
from onnx import ModelProto

from . import expansion, operators, structures
from .building import RANGES, good

__all__ = ["RANGES", "RANGE_ATTACKS", "good", "hostile_models", "ranges_for"]


def ranges_for(data: bytes) -> dict[str, tuple[float, float]]:
    """A range for every value that a model names, as far as it can be read."""
    try:
        nodes = onnx.load_from_string(data).graph.node
    except Exception:  # the whole point of these bytes
        return RANGES
    return RANGES | {name: (-1.0, 1.0) for each in nodes for name in each.output if len(name) < 100}


def hostile_models() -> Iterator[tuple[str, bytes]]:
    """All of them, by title."""
    kinds: tuple[Callable[[], Iterator[tuple[str, ModelProto]]], ...] = (
        operators.attributes,
        operators.operands,
        operators.dimensions,
        expansion.unfolding,
        expansion.long,
        structures.nested,
        structures.graphs,
    )
    for kind in kinds:
        for title, proto in kind():
            yield title, proto.SerializeToString()
    sound = good().SerializeToString()
    for cut in range(0, len(sound), max(1, len(sound) // 40)):
        yield f"cut after {cut} bytes", sound[:cut]
    yield "text", b"these bytes are no model"
    yield "zeros", bytes(10_000)
    yield "nested groups", b"\x3a" + b"\x0a\x80\x80\x01" * 20_000
    yield "a length of exabytes", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"
    yield "a name that is no UTF-8", sound.replace(b"node0", b"\xff\xfe\xff\xfeX")


RANGE_ATTACKS: dict[str, dict[str, tuple[float, float]]] = {
    "none": {},
    "NaN": {**RANGES, "x": (float("nan"), 1.0)},
    "infinite": {**RANGES, "a": (-float("inf"), float("inf"))},
    "reversed": {**RANGES, "a": (1.0, -1.0)},
    "no width": {**RANGES, "y": (0.0, 0.0)},
    "denormal": {**RANGES, "y": (0.0, 1e-45)},
    "vast": {**RANGES, "y": (-3e38, 3e38)},
    "one vast": {**RANGES, "x": (-3e38, 3e38), "y": (-1e-30, 1e-30)},
    "far from zero": {**RANGES, "x": (1e30, 2e30)},
    "of nobody": {**RANGES, "stranger": (float("nan"), float("nan"))},
}
