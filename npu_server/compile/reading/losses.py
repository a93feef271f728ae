"""What a model computes from its labels: the comparison of a loss, which is the client's."""

from collections.abc import Collection, Sequence

from npu_server.compile import graph as g

_NETWORK = g.Conv | g.Gemm | g.MatMul | g.HostPart
"""Operators that a loss does not consist of."""


def tensors_of_a_loss(
    operations: Sequence[g.Operation], entries: Collection[str], returned: Collection[str]
) -> set[str]:
    """Tensors that follow from a label, and what makes an INT8 tensor of one.

    A label is an input, or made by the host from such alone, of which nothing leads to a layer with weights,
    nor to an output of the network's own: only, number by number, to what the client computes last. As codes
    of INT8 labels would be rounded, and cut off where calibration saw no larger ones.

    Args:
        operations: of the network, in the order of execution.
        entries: names of the inputs that are quantized.
        returned: tensors that are outputs of the model themselves.

    Returns:
        Names; none where without them nothing would be left.
    """
    readers: dict[str, list[str]] = {}
    for operation in operations:
        for name in operation.inputs:
            readers.setdefault(name, []).append(operation.output)
    last: set[str] = set()
    for operation in reversed(operations):
        alone = all(reader in last for reader in readers.get(operation.output, ()))
        if alone and operation.output not in returned and not isinstance(operation.operator, _NETWORK):
            last.add(operation.output)
    given = {x.output for x in operations if isinstance(x.operator, g.HostPart) and _from_inputs(x.operator)}
    labels = {
        name
        for name in (*entries, *given)
        if name not in returned and name in readers and last.issuperset(readers[name])
    }
    found = set(labels)
    for operation in operations:
        if not found.isdisjoint(operation.inputs):
            found.add(operation.output)
    left = [operation for operation in operations if operation.output not in found]
    return found.difference(entries) if left else set()


def _from_inputs(part: g.HostPart) -> bool:
    return all(given.axis is None for given in part.inputs)
