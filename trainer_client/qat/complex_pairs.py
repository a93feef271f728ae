"""Complex numbers written out as pairs of real ones: an NPU has none, nor has its ONNX.

Rotary embeddings are often told by them: `view_as_real(view_as_complex(x) * polar(1, angle))`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from trainer_client.qat.calls import call

_aten = torch.ops.aten
_ASSERTS = _aten._assert_tensor_metadata.default

_Pair = tuple[Any, Any]
_Maker = Callable[..., fx.Node]

# What moves numbers and does not compute, both parts alike.
_MOVES = frozenset(
    {
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.view.default,
        _aten.reshape.default,
        _aten.expand.default,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.index.Tensor,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.alias.default,
    }
)
_KEEPS = frozenset({_aten.to.dtype_layout, _aten.to.device, _aten.to.dtype, _aten._to_copy.default})
_MAKES = frozenset({_aten.polar.default, _aten.complex.default, _aten.view_as_complex.default})
_ENDS = frozenset({_aten.view_as_real.default, _aten.real.default, _aten.imag.default, _ASSERTS})
_KNOWN = _MOVES | _KEEPS | _MAKES | _ENDS | {_aten.mul.Tensor}


def write_out_complex(program: ExportedProgram) -> ExportedProgram:
    """The program with real tensors only; itself where it has none other, or does more than rotate.

    Args:
        program: not changed, if another one is returned.
    """
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if not any(_is_complex(node) for graph in graphs for node in graph.nodes):
        return program
    flat: ExportedProgram = program.run_decompositions(
        {}
    )  # regions under `torch.no_grad` are graphs of their own before
    graph = flat.graph_module.graph
    concerned = [n for n in graph.nodes if _is_complex(n) or any(map(_is_complex, n.all_input_nodes))]
    if any(node.target not in _KNOWN for node in concerned):
        return program
    pairs: dict[fx.Node, tuple[Any, ...]] = {}
    for node in concerned:
        with graph.inserting_before(node):
            _write_out(node, pairs)
    for node in reversed(concerned):
        graph.erase_node(node)
    flat.graph_module.recompile()
    return flat


def _write_out(node: fx.Node, pairs: dict[fx.Node, tuple[Any, ...]]) -> None:
    arguments: tuple[Any, ...] = node.args
    first, *rest = arguments

    def make(target: Any, *args: Any) -> fx.Node:
        return call(node.graph, node, target, *args)

    if node.target is _ASSERTS:
        return
    if node.target in _MAKES:
        pairs[node] = _parts(make, node.target, first, rest)
    elif node.target in _MOVES:
        re, im = pairs[first]
        pairs[node] = make(node.target, re, *rest), make(node.target, im, *rest)
    elif node.target in _KEEPS:
        pairs[node] = pairs[first]
    elif node.target in _ENDS:
        re, im = pairs[first]
        ends = {_aten.real.default: re, _aten.imag.default: im}
        node.replace_all_uses_with(ends.get(node.target) or make(_aten.stack.default, [re, im], -1))
    else:
        one, other = (pairs.get(x, (x,)) for x in (first, rest[0]))
        pairs[node] = _product(make, one, other)


def _parts(make: _Maker, target: Any, first: Any, rest: list[Any]) -> _Pair:
    if target is _aten.complex.default:
        return first, rest[0]
    if target is _aten.view_as_complex.default:
        return make(_aten.select.int, first, -1, 0), make(_aten.select.int, first, -1, 1)
    cosine, sine = make(_aten.cos.default, rest[0]), make(_aten.sin.default, rest[0])
    return make(_aten.mul.Tensor, first, cosine), make(_aten.mul.Tensor, first, sine)


def _product(make: _Maker, one: tuple[Any, ...], other: tuple[Any, ...]) -> _Pair:
    """Of two complex numbers, or of one and a real number."""
    if len(one) == 1:
        one, other = other, one
    (a, b), c = one, other[0]
    mul = _aten.mul.Tensor
    if len(other) == 1:
        return make(mul, a, c), make(mul, b, c)
    d = other[1]
    return (
        make(_aten.sub.Tensor, make(mul, a, c), make(mul, b, d)),
        make(_aten.add.Tensor, make(mul, a, d), make(mul, b, c)),
    )


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()
