"""Rewrites that merge operations into the layers of an NPU."""

from collections.abc import Callable
from dataclasses import replace

from npu_server.compile.constants import Constants
from npu_server.compile.graph import (
    Add,
    Affine,
    Clamp,
    Conv,
    Function,
    Gemm,
    Graph,
    Kernel,
    Lut,
    Mul,
    Operation,
    Weights,
    Window,
)
from npu_wire.errors import UnsupportedModel


def fuse(graph: Graph, constants: Constants) -> Graph:
    """Makes tables of functions of one activation, folds constants into weights, fuses activations.

    A merged operation keeps the name of its last node's output, by which the client joins.

    Raises:
        UnsupportedModel: an operation that is left over is none of the NPU's.
    """
    graph = _fuse_tables(graph, constants)
    graph = _fuse_into_producer(graph, _fold_affine)
    graph = _fuse_into_producer(graph, _fuse_clamp)
    return graph.with_operations([_standalone(operation) for operation in graph.operations])


def _fuse_tables(graph: Graph, constants: Constants) -> Graph:
    """Replaces each subgraph of element-wise operations that is a function of one activation by a table.

    SiLU arrives as Mul(x, Sigmoid(x)), hard swish sometimes as x * Clip(x + 3, 0, 6) / 6.
    """
    uses = graph.uses()
    producer = {operation.output: operation for operation in graph.operations}
    position = {operation.output: i for i, operation in enumerate(graph.operations)}
    result: list[Operation] = []
    absorbed: set[str] = set()
    for operation in reversed(graph.operations):
        if operation.output in absorbed:
            continue
        steps = _smallest_function(operation, producer, position, uses, constants)
        if steps is None:
            result.append(operation)
            continue
        absorbed.update(step.output for step in steps)
        root = next(name for step in steps for name in step.inputs if name not in absorbed)
        nodes = tuple(name for step in steps for name in step.nodes)
        result.append(Operation(operation.output, (root,), Lut(tuple(steps)), operation.shape, nodes))
    return graph.with_operations(result[::-1])


def _smallest_function(
    sink: Operation,
    producer: dict[str, Operation],
    position: dict[str, int],
    uses: dict[str, int],
    constants: Constants,
) -> list[Operation] | None:
    """The fewest operations up to `sink` with one activation as input that need a table; None if none do."""
    if not _is_elementwise(sink, constants):
        return None
    chosen = [sink]
    while True:
        outputs = {step.output for step in chosen}
        frontier = {name for step in chosen for name in step.inputs} - outputs
        if len(frontier) == 1 and _needs_table(chosen, outputs):
            return sorted(chosen, key=lambda step: position[step.output])
        candidates = [
            producer[name]
            for name in frontier
            if name in producer
            and _is_elementwise(producer[name], constants)
            and uses[name] == sum(step.inputs.count(name) for step in chosen)
        ]
        if not candidates:
            return None
        # The latest first: so nothing is taken in that comes before the one activation it all depends on.
        chosen.append(max(candidates, key=lambda step: position[step.output]))


def _is_elementwise(operation: Operation, constants: Constants) -> bool:
    kernel = operation.kernel
    if isinstance(kernel, Affine):
        return kernel.kind != "batch_norm" and constants.array(kernel.values[0]).size == 1
    return isinstance(kernel, Function | Clamp | Add | Mul)


def _needs_table(steps: list[Operation], outputs: set[str]) -> bool:
    """A lone Relu or a lone multiplication by a constant has a cheaper place than a table."""
    return any(
        isinstance(step.kernel, Function | Add | Mul)
        or (isinstance(step.kernel, Clamp) and any(name in outputs for name in step.inputs))
        for step in steps
    )


def _fold_affine(producer: Operation, follower: Operation) -> Operation | None:
    kernel = producer.kernel
    if not isinstance(follower.kernel, Affine) or not isinstance(kernel, Conv | Gemm):
        return None
    weights = replace(kernel.weights, affines=(*kernel.weights.affines, follower.kernel))
    return replace(producer, kernel=replace(kernel, weights=weights))


def _fuse_clamp(producer: Operation, follower: Operation) -> Operation | None:
    if not isinstance(follower.kernel, Clamp) or not isinstance(
        producer.kernel, Conv | Gemm | Add | Mul | Affine
    ):
        return None
    before = producer.clamp or Clamp()
    low = max(before.low, follower.kernel.low)
    return replace(producer, clamp=Clamp(low, max(low, min(before.high, follower.kernel.high))))


def _fuse_into_producer(graph: Graph, merge: Callable[[Operation, Operation], Operation | None]) -> Graph:
    """Merges each operation into the one before, where `merge` can and nobody else reads what is between."""
    uses = graph.uses()
    result: dict[str, Operation] = {}
    for operation in graph.operations:
        before = result.get(operation.inputs[0])
        merged = merge(before, operation) if before is not None and uses[before.output] == 1 else None
        if merged is None or before is None:
            result[operation.output] = operation
            continue
        del result[before.output]
        result[operation.output] = replace(
            merged, output=operation.output, nodes=before.nodes + operation.nodes
        )
    return graph.with_operations(list(result.values()))


def _standalone(operation: Operation) -> Operation:
    """A constant per channel after no convolution is a depthwise convolution with one weight a channel."""
    if not isinstance(operation.kernel, Affine):
        return operation
    if len(operation.shape) not in (1, 3):
        raise UnsupportedModel(
            f"node {operation.nodes[0]!r}: constant operand on a rank {len(operation.shape) + 1} tensor; "
            "the NPU has that on (N, C) and (N, C, H, W) only"
        )
    channels = operation.shape[0]
    weights = Weights(None, None, channels, affines=(operation.kernel,))
    kernel: Kernel = Conv(weights, Window((1, 1)), channels)
    return replace(operation, kernel=kernel)
