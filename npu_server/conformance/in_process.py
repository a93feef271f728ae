"""What only shows in the process: opening and closing, iterators, and who owns the memory of a tensor."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from npu_server.backends.base import LayerTensor, Program
from npu_server.conformance.probe import Broken, Probe, raises, same
from npu_server.conformance.targets import LocalTarget, run_all
from npu_wire.errors import InvalidInput, NpuError
from npu_wire.layer_map import MemoryLayout


def _program(probe: Probe) -> Program:
    assert isinstance(probe.target, LocalTarget)
    return probe.target.backend.compile(probe.case.model(), probe.ranges)


def _taps(program: Program) -> range:
    return range(len(program.layer_map.layers))


def tensors_stay(probe: Probe) -> None:
    """A yielded tensor is never written to again: it is sent later, from another thread."""
    program = _program(probe)
    held: list[tuple[LayerTensor, bytes]] = []
    for tensor in program.forward(probe.batch, _taps(program)):
        held.append((tensor, tensor.data.tobytes()))
    for _ in program.forward(probe.batch[::-1].copy(), _taps(program)):
        pass
    program.load_weights(probe.other_weights())
    for _ in program.forward(probe.batch, ()):
        pass
    program.close()
    for tensor, content in held:
        if tensor.data.tobytes() != content:
            raise Broken(
                f"layer {tensor.layer} was overwritten after it had been yielded; yield arrays of their own"
            )


def input_stays(probe: Probe) -> None:
    """The batch belongs to the caller: a program does not change it."""
    program, batch = _program(probe), probe.batch.copy()
    for _ in program.forward(batch, _taps(program)):
        pass
    if not np.array_equal(batch, probe.batch):
        raise Broken("the program has written into its input")


def memory_layout(probe: Probe) -> None:
    """Tensors lie in memory in the order that the layer map says."""
    program = _program(probe)
    for tensor in program.forward(probe.batch, _taps(program)):
        spec = program.layer_map.layers[tensor.layer].output
        last = spec.layout is MemoryLayout.CHANNELS_LAST
        ordered = np.moveaxis(tensor.data, 1, -1) if last else tensor.data
        if not ordered.flags.c_contiguous:
            raise Broken(
                f"'{spec.name}' does not lie in memory as {spec.layout.name.lower()}, which its spec says"
            )


def ordered_and_timed(probe: Probe) -> None:
    """Layers come in the order of execution, each begun before it ends."""
    program = _program(probe)
    came = list(program.forward(probe.batch, _taps(program)))
    if [tensor.layer for tensor in came] != list(_taps(program)):
        raise Broken(f"layers came as {[tensor.layer for tensor in came]}")
    for tensor in came:
        if not 0 < tensor.start_ns <= tensor.end_ns:
            raise Broken(
                f"layer {tensor.layer} began at {tensor.start_ns} ns and ended at {tensor.end_ns} ns"
            )


def abandoned_batch(probe: Probe) -> None:
    """A batch that is given up after its first layer leaves nothing behind."""
    session = probe.compile()
    expected = run_all(session, probe.batch)
    program = _program(probe)
    iterator = program.forward(probe.batch[::-1].copy(), _taps(program))
    next(iter(iterator))
    del iterator
    layers = program.layer_map.layers
    after = {layers[t.layer].name: t.data for t in program.forward(probe.batch, _taps(program))}
    same(after, expected, "after an abandoned batch")
    program.close()


def closed_while_running(probe: Probe) -> None:
    """A program closed in the middle of a batch ends it with an `NpuError` or rightly; others go on."""
    expected = run_all(probe.compile(), probe.batch)
    program = _program(probe)
    layers = program.layer_map.layers
    iterator = iter(program.forward(probe.batch, _taps(program)))
    got = [next(iterator)]
    program.close()
    with contextlib.suppress(NpuError):
        got += list(iterator)
    for tensor in got:
        name = layers[tensor.layer].name
        same({name: tensor.data}, {name: expected[name]}, "closed in the middle of a batch")
    same(run_all(probe.compile(), probe.batch), expected, "another program after one was closed in a batch")


def negative_tap(probe: Probe) -> None:
    """Layer -1 is no layer."""
    program = _program(probe)
    raises(InvalidInput, lambda: list(program.forward(probe.batch, (-1,))), "a tap of layer -1")
    program.close()


def describe_is_pure(probe: Probe) -> None:
    """`describe` tells the same each time."""
    assert isinstance(probe.target, LocalTarget)
    backend = probe.target.backend
    first = backend.describe()
    if backend.describe() != first:
        raise Broken("two calls of describe() differ")
    if len(set(first.operators)) != len(first.operators):
        raise Broken("an operator is declared twice")


def close_twice(probe: Probe) -> None:
    """Closing the backend twice is allowed, and it can be opened again."""
    assert isinstance(probe.target, LocalTarget)
    backend = probe.target.backend
    expected = run_all(probe.compile(), probe.batch)
    probe.release()
    backend.close()
    backend.close()
    backend.open()
    if not backend.probe().ok:
        raise Broken(f"opened again, it is not well: {backend.probe().detail}")
    same(run_all(probe.compile(), probe.batch), expected, "opened again")


def in_process_checks() -> Iterator[tuple[str, Callable[[Probe], None]]]:
    """Every check that needs the backend itself: what it is about, and the check."""
    groups: dict[str, tuple[Callable[[Probe], None], ...]] = {
        "memory": (tensors_stay, input_stays, memory_layout),
        "iteration": (ordered_and_timed, abandoned_batch, closed_while_running, negative_tap),
        "lifecycle": (describe_is_pure, close_twice),
    }
    for group, checks in groups.items():
        for check in checks:
            yield group, check
