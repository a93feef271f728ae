"""Rewrites that merge operations into the layers of an NPU."""

import math
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from heapq import heappop, heappush

from npu_server.compile.graph import (
    Add,
    Affine,
    Choose,
    Clamp,
    Conv,
    Function,
    Gemm,
    Graph,
    HostFloat,
    Lut,
    MatMul,
    Mul,
    Operand,
    Operation,
    Operator,
    Pad,
    Reshape,
    Shape,
    Sub,
    Weights,
    Window,
    beside_constant,
)
from npu_server.compile.reading.constants import Constants
from npu_server.numerics.profile import Profile
from npu_wire.errors import UnsupportedModel

_NEEDS_TABLE = Function | Add | Sub | Mul | Choose
_HIDES = -64.0
"""exp of it is nothing beside 1, in float32 as in INT8."""

_LONGEST_FUNCTION = 64
"""Nodes of a table's function; without a bound a long chain of constants would take cubic time."""


def fuse(graph: Graph, constants: Constants, calibrated: Container[str] | None = None) -> Graph:
    """Makes tables of functions of one activation, folds constants into weights, fuses activations.

    A merged operation keeps the name of its last node's output, by which the client joins.

    Args:
        graph: what the importer made.
        constants: the model's.
        calibrated: activations whose range is known; a table reaches back to one of them if it can. None: all
            are.
    """
    graph = _fold_masks(graph, constants)
    graph = _fuse_tables(graph, constants, calibrated)
    graph = _fuse_into_producer(graph, _fold_pad)
    graph = _fuse_into_producer(graph, _fold_reshape)
    graph = _fuse_into_producer(graph, partial(_fold_factor, constants))
    graph = _fuse_into_producer(graph, _fold_affine)
    graph = _fuse_into_producer(graph, _fuse_clamp)
    return graph.with_operations([_standalone(operation) for operation in graph.operations])


def _fuse_tables(graph: Graph, constants: Constants, calibrated: Container[str] | None) -> Graph:
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
        steps = _smallest_function(operation, producer, position, uses, constants, calibrated)
        if steps is None:
            result.append(operation)
            continue
        absorbed.update(step.output for step in steps)
        root = next(name for step in steps for name in step.inputs if name not in absorbed)
        nodes = tuple(name for step in steps for name in step.nodes)
        result.append(replace(operation, inputs=(root,), operator=Lut(tuple(steps)), nodes=nodes))
    return graph.with_operations(result[::-1])


def _smallest_function(
    sink: Operation,
    producer: dict[str, Operation],
    position: dict[str, int],
    uses: dict[str, int],
    constants: Constants,
    calibrated: Container[str] | None,
) -> list[Operation] | None:
    """The fewest operations up to `sink` with one activation as input that need a table; None if none do.

    What the exporter puts between two nodes of the user's network has no range; a table that could begin only
    there is the last resort.
    """
    if not _is_elementwise(sink, constants):
        return None
    chosen: list[Operation] = []
    reads: Counter[str] = Counter()  # by the chosen steps
    clamped: set[str] = set()
    frontier: set[str] = set()
    candidates = [(0, sink)]
    needs_table, found = False, None
    while candidates and len(chosen) < _LONGEST_FUNCTION:
        # The latest first: so nothing is taken in that comes before the one activation it all depends on.
        _, step = heappop(candidates)
        chosen.append(step)
        # A lone Relu or a lone multiplication by a constant has a cheaper place than a table.
        needs_table |= isinstance(step.operator, _NEEDS_TABLE) or step.output in clamped
        clamped.update(step.inputs if isinstance(step.operator, Clamp) else ())
        frontier.discard(step.output)
        frontier.update(step.inputs)
        reads.update(step.inputs)
        if len(frontier) == 1 and needs_table:
            found = sorted(chosen, key=lambda step: position[step.output])
            if calibrated is None or next(iter(frontier)) in calibrated:
                return found
        for name in set(step.inputs):
            before = producer.get(name)
            if before is not None and uses[name] == reads[name] and _is_elementwise(before, constants):
                heappush(candidates, (-position[name], before))
    return found


def _is_elementwise(operation: Operation, constants: Constants) -> bool:
    operator = operation.operator
    if isinstance(operator, Affine):
        return operator.per_tensor
    beside_constant = getattr(operator, "operand", None) is not None
    return isinstance(operator, _NEEDS_TABLE | Clamp) and not beside_constant


def _fold_masks(graph: Graph, constants: Constants) -> Graph:
    """Masks of attention are added by the host, in front of its softmax.

    In a tensor of the NPU the numbers that hide would stretch the range until nothing else is left of it.
    """
    uses = graph.uses()
    producer = {operation.output: operation for operation in graph.operations}
    result = {operation.output: operation for operation in graph.operations}
    for operation in graph.operations:
        operator = operation.operator
        if not isinstance(operator, HostFloat) or operator.op not in ("Softmax", "LogSoftmax"):
            continue
        passed: list[Operation] = []
        masks: list[Operand] = []
        name: str = operation.inputs[0]
        masked: Shape = ()
        while name in producer and uses[name] == 1:
            before = producer[name]
            hides = _hides(before.operator, constants)
            if hides is not None and masked in ((), before.shape):
                masks.insert(0, hides)
                masked = before.shape
            elif not isinstance(before.operator, Reshape) or masks:
                break
            passed.insert(0, before)
            name = before.inputs[0]
        if masks:
            for before in passed:
                del result[before.output]
            nodes = tuple(node for before in passed for node in before.nodes) + operation.nodes
            folded = replace(operator, masks=tuple(masks), masked=masked)
            result[operation.output] = replace(operation, inputs=(name,), operator=folded, nodes=nodes)
    return graph.with_operations(list(result.values()))


def _hides(operator: Operator, constants: Constants) -> Operand | None:
    """The constant that is added, if some of it is so far below 0 that softmax makes 0 of what it hides."""
    if not isinstance(operator, Affine) or operator.kind != "add" or operator.operand is None:
        return None
    values = constants.array(operator.operand.name)
    return operator.operand if bool((values <= _HIDES).any()) else None


def _fold_pad(producer: Operation, follower: Operation) -> Operation | None:
    """Zeros around an image become the convolution's own padding."""
    operator, pad = follower.operator, producer.operator
    if not isinstance(pad, Pad) or not isinstance(operator, Conv) or operator.stuffing or len(pad.pads) != 3:
        return None
    channels, rows, columns = pad.pads
    if channels != (0, 0):
        return None
    own = operator.window.pads
    around = (own[0] + rows[0], own[1] + columns[0], own[2] + rows[1], own[3] + columns[1])
    window = replace(operator.window, pads=around)
    return replace(follower, inputs=producer.inputs, operator=replace(operator, window=window))


def _fold_reshape(producer: Operation, follower: Operation) -> Operation | None:
    """The host may hand its result over in any shape (group norm arrives between two reshapes)."""
    if not isinstance(follower.operator, Reshape) or not isinstance(producer.operator, HostFloat):
        return None
    return producer if producer.operator.op == "InstanceNormalization" else None


def _fold_factor(constants: Constants, producer: Operation, follower: Operation) -> Operation | None:
    """The 1 / sqrt(d) of attention goes into the multiplier of the scores."""
    operator, affine = producer.operator, follower.operator
    if not isinstance(operator, MatMul) or not isinstance(affine, Affine) or not affine.per_tensor:
        return None
    if affine.kind not in ("mul", "div") or constants[affine.values[0]].parameters:
        return None
    value = float(constants.array(affine.values[0]).reshape(-1)[0])
    if not 0 < value < math.inf:
        return None
    return replace(producer, operator=replace(operator, factors=(*operator.factors, affine)))


def _fold_affine(producer: Operation, follower: Operation) -> Operation | None:
    operator, affine = producer.operator, follower.operator
    if not isinstance(affine, Affine):
        return None
    if isinstance(operator, HostFloat) and affine.operand is not None:
        return replace(producer, operator=replace(operator, affines=(*operator.affines, affine)))
    if not isinstance(operator, Conv | Gemm):
        return None
    channels = 1 if isinstance(operator, Conv) else len(producer.shape) + 1 + operator.axis
    if not affine.is_along(channels):
        return None
    weights = replace(operator.weights, affines=(*operator.weights.affines, affine))
    return replace(producer, operator=replace(operator, weights=weights))


def _fuse_clamp(producer: Operation, follower: Operation) -> Operation | None:
    if not isinstance(follower.operator, Clamp) or not isinstance(
        producer.operator, Conv | Gemm | MatMul | Add | Sub | Mul | Affine
    ):
        return None
    before = producer.clamp or Clamp()
    low = max(before.low, follower.operator.low)
    high = max(low, min(before.high, follower.operator.high))
    return replace(producer, clamp=replace(follower.operator, low=low, high=high))


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
            merged,
            output=operation.output,
            shape=operation.shape,
            nodes=before.nodes + operation.nodes,
            outer=operation.outer,
        )
    return graph.with_operations(list(result.values()))


def _standalone(operation: Operation) -> Operation:
    """What a constant that found no weights to be folded into becomes.

    One number a channel of an image: a depthwise convolution with one weight a channel. Else: an addition or
    a product with a quantized constant.
    """
    operator = operation.operator
    if not isinstance(operator, Affine):
        return operation
    if operator.kind == "batch_norm" and operator.axis != 1:
        # Samples are in rows (a batch norm on merged axes): a matrix with nothing beside its diagonal.
        weights = Weights(None, None, operation.shape[operator.axis - 1], affines=(operator,))
        return replace(operation, operator=Gemm(weights, operator.axis - len(operation.shape) - 1))
    if operator.kind == "batch_norm" or (operator.is_along(1) and len(operation.shape) in (1, 3)):
        channels = operation.shape[0]
        weights = Weights(None, None, channels, affines=(operator,))
        return replace(operation, operator=Conv(weights, Window((1, 1)), channels))
    assert operator.operand is not None
    return replace(operation, operator=beside_constant(operator.kind, operator.operand))


def refusals(graph: Graph, profile: Profile) -> dict[str, UnsupportedModel]:
    """What is left of a fused graph that is none of the NPU's: output -> why."""
    found = {}
    for operation in graph.operations:
        operator, node = operation.operator, operation.nodes[:1]
        if isinstance(operator, Choose) or (
            isinstance(operator, Function) and operator.name in _ONLY_IN_TABLES
        ):
            found[operation.output] = UnsupportedModel(
                f"node {node[0]!r}: a comparison is an operator of the NPU only as a part of a function of "
                "one activation"
            )
        if isinstance(operator, HostFloat) and operator.op not in profile.host_float.operators:
            found[operation.output] = UnsupportedModel(
                f"node {node[0]!r} ({operator.op}): the NPU {profile.name!r} has no integer arithmetic for "
                "it, and its profile does not list it under host_float.operators"
            )
    return found


_ONLY_IN_TABLES = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")
