"""What only shows in the process: opening and closing, iterators, and who owns the memory of a tensor."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from npu_server.conformance.probe import Broken, Probe, raises, same
from npu_server.conformance.targets import LocalTarget, run_all
from npu_server.seam import LayerTensor, Program
from npu_wire.errors import InvalidInput, NpuError
from npu_wire.layer_map import Int8Array, MemoryLayout


def _program(probe: Probe) -> Program:
    assert isinstance(probe.target, LocalTarget)
    return probe.target.backend.compile(probe.case.model(), probe.ranges)


def _all_layers(program: Program, batch: Int8Array) -> Iterator[LayerTensor]:
    every = range(len(program.layer_map.layers))
    inputs = program.layer_map.named(batch)
    return (tensor for tensor in program.forward(inputs, every) if tensor is not None)


def tensors_stay(probe: Probe) -> None:
    """A yielded tensor is never written to again: it is sent later, from another thread."""
    program = _program(probe)
    held: list[tuple[LayerTensor, bytes]] = []
    for tensor in _all_layers(program, probe.batch):
        held.append((tensor, tensor.data.tobytes()))
    for _ in _all_layers(program, probe.batch[::-1].copy()):
        pass
    program.load_weights(probe.other_weights())
    for _ in program.forward(program.layer_map.named(probe.batch), ()):
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
    for _ in _all_layers(program, batch):
        pass
    if not np.array_equal(batch, probe.batch):
        raise Broken("the program has written into its input")


def memory_layout(probe: Probe) -> None:
    """Tensors lie in memory in the order that the layer map says."""
    program = _program(probe)
    for tensor in _all_layers(program, probe.batch):
        spec = program.layer_map.layers[tensor.layer].output
        last = spec.layout is MemoryLayout.CHANNELS_LAST
        ordered = np.moveaxis(tensor.data, 1, -1) if last else tensor.data
        if not ordered.flags.c_contiguous:
            raise Broken(
                f"'{spec.name}' does not lie in memory as {spec.layout.name.lower()}, which its spec says"
            )


def parameters_told(probe: Probe) -> None:
    """A program tells name and shape of every initializer that its layers derive from."""
    program = _program(probe)
    told = dict(program.parameters)
    for name, array in probe.case.weights().items():
        if told.get(name) != array.shape:
            raise Broken(f"parameters says {told.get(name)} of '{name}', whose shape is {array.shape}")
    for layer in program.layer_map.layers:
        if not told.keys() >= set(layer.parameters):
            raise Broken(f"parameters lacks one of {layer.parameters}, from which '{layer.name}' derives")
    program.close()


def ordered_and_timed(probe: Probe) -> None:
    """Layers come in the order of execution, each begun before it ends."""
    program = _program(probe)
    came = list(_all_layers(program, probe.batch))
    if [tensor.layer for tensor in came] != list(range(len(program.layer_map.layers))):
        raise Broken(f"layers came as {[tensor.layer for tensor in came]}")
    for tensor in came:
        if not 0 < tensor.start_ns <= tensor.end_ns:
            raise Broken(
                f"layer {tensor.layer} began at {tensor.start_ns} ns and ended at {tensor.end_ns} ns"
            )


def abandoned_batch(probe: Probe) -> None:
    """A batch that is given up after its first layer leaves nothing behind."""
    compiled = probe.compile()
    expected = run_all(compiled, probe.batch)
    program = _program(probe)
    iterator = _all_layers(program, probe.batch[::-1].copy())
    next(iter(iterator))
    del iterator
    layers = program.layer_map.layers
    after = {layers[t.layer].name: t.data for t in _all_layers(program, probe.batch)}
    same(after, expected, "after an abandoned batch")
    program.close()


def closed_while_running(probe: Probe) -> None:
    """A program closed in the middle of a batch ends it with an `NpuError` or rightly; others go on."""
    expected = run_all(probe.compile(), probe.batch)
    program = _program(probe)
    layers = program.layer_map.layers
    iterator = iter(_all_layers(program, probe.batch))
    got = [next(iterator)]
    program.close()
    with contextlib.suppress(NpuError):
        got += list(iterator)
    for tensor in got:
        name = layers[tensor.layer].name
        same({name: tensor.data}, {name: expected[name]}, "closed in the middle of a batch")
    same(run_all(probe.compile(), probe.batch), expected, "another program after one was closed in a batch")


def paused_between_layers(probe: Probe) -> None:
    """A batch may wait at any layer while another program computes and a third is compiled elsewhere."""
    expected = run_all(probe.compile(), probe.batch)
    first, second = _program(probe), _program(probe)
    names = [layer.name for layer in first.layer_map.layers]
    got: dict[str, dict[str, Int8Array]] = {"paused": {}, "in between": {}, "compiled meanwhile": {}}
    with ThreadPoolExecutor(1) as elsewhere:
        fresh = elsewhere.submit(_program, probe)
        both = (_all_layers(first, probe.batch), _all_layers(second, probe.batch))
        for pair in zip(*both, strict=True):
            for what, tensor in zip(got, pair, strict=False):
                got[what][names[tensor.layer]] = tensor.data
        third = fresh.result()
    got["compiled meanwhile"] = {names[t.layer]: t.data for t in _all_layers(third, probe.batch)}
    for what, tensors in got.items():
        same(tensors, expected, what)
    for program in (first, second, third):
        program.close()


def negative_tap(probe: Probe) -> None:
    """Layer -1 is no layer."""
    program = _program(probe)
    inputs = program.layer_map.named(probe.batch)
    raises(InvalidInput, lambda: list(program.forward(inputs, (-1,))), "a tap of layer -1")
    program.close()


def close_twice(probe: Probe) -> None:
    """Closing the backend twice is allowed, and opened again it tells and computes the same."""
    assert isinstance(probe.target, LocalTarget)
    backend = probe.target.backend
    expected = run_all(probe.compile(), probe.batch)
    probe.release()
    backend.close()
    backend.close()
    before, again = probe.target.capabilities, backend.open()
    if again != before:
        raise Broken(f"opened again, it says {again}; the first time {before}")
    if len(set(again.operators)) != len(again.operators):
        raise Broken("an operator is declared twice")
    if not backend.probe().ok:
        raise Broken(f"opened again, it is not well: {backend.probe().detail}")
    same(run_all(probe.compile(), probe.batch), expected, "opened again")


def in_process_checks() -> Iterator[tuple[str, Callable[[Probe], None]]]:
    """Every check that needs the backend itself: what it is about, and the check."""
    groups: dict[str, tuple[Callable[[Probe], None], ...]] = {
        "memory": (tensors_stay, input_stays, memory_layout),
        "iteration": (
            ordered_and_timed,
            abandoned_batch,
            closed_while_running,
            paused_between_layers,
            negative_tap,
        ),
        "weights": (parameters_told,),
        "lifecycle": (close_twice,),
    }
    for group, checks in groups.items():
        for check in checks:
            yield group, check
