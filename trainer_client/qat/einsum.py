"""Einstein sums written out as products of matrices, which an NPU has.

An equation over any number of operands is a chain of products of two; each is one matrix product with axes
merged, or an element-wise product where nothing is summed.
"""

from dataclasses import dataclass

import torch
from torch import fx

from trainer_client.qat.calls import call

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """A tensor and a label for each of its axes."""

    node: fx.Node
    labels: tuple[str, ...]


def write_out_einsum(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Inserts the products before an `einsum`.

    Returns:
        What replaces it; the node itself where labels repeat within an operand, or axes of one label differ
        in size.
    """
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, list | tuple)
    nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
    parsed = _parsed(equation, [operand.meta["val"].ndim for operand in nodes])
    if parsed is None or len(nodes) != len(operands):
        return node
    terms, output = [_Term(*pair) for pair in zip(nodes, parsed[0], strict=True)], parsed[1]
    sizes: dict[str, str] = {}
    for term in terms:
        for label, size in zip(term.labels, term.node.meta["val"].shape, strict=True):
            if sizes.setdefault(label, str(size)) != str(size):
                return node
    writer = _Writer(graph, node)
    result = terms[0]
    for i, term in enumerate(terms[1:], 1):
        wanted = set(output).union(*(later.labels for later in terms[i + 1 :]))
        result = writer.product(result, term, wanted)
    return writer.arranged(writer.summed(result, set(output)), output).node


class _Writer:
    """Inserts nodes."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        self._graph = graph
        self._origin = origin

    def product(self, a: _Term, b: _Term, wanted: set[str]) -> _Term:
        """Two terms multiplied, and summed over what only they have."""
        a, b = self.summed(a, wanted | {*b.labels}), self.summed(b, wanted | {*a.labels})
        if _moving(b) and not _moving(a):
            a, b = b, a  # samples in rows: a constant on the right is a weight
        both = [label for label in a.labels if label in b.labels]
        shared = [label for label in both if label in wanted]
        summed = [label for label in both if label not in wanted]
        left = [label for label in a.labels if label not in both]
        right = [label for label in b.labels if label not in both]
        outer = [label for label in left if label in _moving(a)]
        left = [label for label in left if label not in outer]
        a = self.arranged(a, (*outer, *shared, *left, *summed))
        b = self.arranged(b, (*shared, *summed, *right))
        first = len(outer) + len(shared)
        if not summed:
            rows, columns = a.node, b.node
            for _ in right:
                rows = self._call(_aten.unsqueeze.default, rows, -1)
            for _ in left:
                columns = self._call(_aten.unsqueeze.default, columns, len(shared))
            result = self._call(_aten.mul.Tensor, rows, columns)
        else:
            rows = self._merged(self._merged(a.node, first + len(left), len(summed)), first, len(left))
            columns = self._merged(b.node, len(shared) + len(summed), len(right))
            columns = self._merged(columns, len(shared), len(summed))
            result = self._call(_aten.matmul.default, rows, columns)
            result = self._apart(result, first + 1, [_size(b, label) for label in right])
            result = self._apart(result, first, [_size(a, label) for label in left])
        return _Term(result, (*outer, *shared, *left, *right))

    def summed(self, term: _Term, wanted: set[str]) -> _Term:
        """Without the axes that nobody wants."""
        gone = [i for i, label in enumerate(term.labels) if label not in wanted]
        if not gone:
            return term
        kept = tuple(label for label in term.labels if label in wanted)
        return _Term(self._call(_aten.sum.dim_IntList, term.node, gone), kept)

    def arranged(self, term: _Term, labels: tuple[str, ...]) -> _Term:
        """The axes in another order."""
        if labels == term.labels:
            return term
        order = [term.labels.index(label) for label in labels]
        return _Term(self._call(_aten.permute.default, term.node, order), labels)

    def _merged(self, node: fx.Node, first: int, axes: int) -> fx.Node:
        """Some axes as one."""
        if axes == 0:
            return self._call(_aten.unsqueeze.default, node, first)
        return node if axes == 1 else self._call(_aten.flatten.using_ints, node, first, first + axes - 1)

    def _apart(self, node: fx.Node, axis: int, sizes: list[int]) -> fx.Node:
        """One axis as some."""
        if not sizes:
            return self._call(_aten.squeeze.dim, node, axis)
        return node if len(sizes) == 1 else self._call(_aten.unflatten.int, node, axis, sizes)

    def _call(self, target: object, *args: object) -> fx.Node:
        return call(self._graph, self._origin, target, *args)


def _moving(term: _Term) -> list[str]:
    """Labels of axes whose size is not fixed: the samples'."""
    return [label for label in term.labels if not isinstance(_size(term, label), int)]


def _size(term: _Term, label: str) -> int:
    size: int = term.node.meta["val"].shape[term.labels.index(label)]
    return size


def _parsed(equation: str, ranks: list[int]) -> tuple[list[tuple[str, ...]], tuple[str, ...]] | None:
    """Labels of the operands and of the output; None where a label repeats within one of them."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = [_labels(part, rank) for part, rank in zip(left.split(","), ranks, strict=True)]
    if any(len({*labels}) < len(labels) for labels in operands):
        return None
    every = [label for labels in operands for label in labels]
    broadcast = sorted({label for label in every if len(label) > 1}, key=lambda x: int(x[1:]), reverse=True)
    if not arrow:
        once = sorted(label for label in every if every.count(label) == 1 and len(label) == 1)
        return operands, (*broadcast, *once)
    before, dots, after = right.partition("...")
    return operands, (*before, *(broadcast if dots else ()), *after)


def _labels(part: str, rank: int) -> tuple[str, ...]:
    """A label for each axis; those that "..." stands for are called ".0", ".1", from the last."""
    before, dots, after = part.partition("...")
    hidden = rank - len(before) - len(after)
    names = [f".{i}" for i in reversed(range(hidden))] if dots else []
    return (*before, *names, *after)
