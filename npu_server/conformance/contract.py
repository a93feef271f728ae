"""The contract of a backend beyond its arithmetic: lifecycle, weights, determinism, limits; on any route."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npu_server.conformance.graphs import INPUT, OTHER_INPUT, OUTPUT, SUM, float_values, with_two_inputs
from npu_server.conformance.probe import Broken, Probe, raises, same
from npu_server.conformance.targets import run_all
from npu_wire.errors import InvalidInput, InvalidModel, NonFiniteInput, NotCalibrated, NpuError
from npu_wire.layer_map import Float32Array

_LARGEST_BATCH_TRIED = 4096


def compile_twice(probe: Probe) -> None:
    """Compiling a model twice gives equal layer maps and equal outputs."""
    first, second = probe.compile(), probe.compile()
    if first.layer_map != second.layer_map:
        raise Broken("two compilations of one model have different layer maps")
    same(run_all(second, probe.batch), run_all(first, probe.batch), "compiled a second time")


def side_by_side(probe: Probe) -> None:
    """Two programs do not disturb each other."""
    expected = run_all(probe.compile(), probe.batch)
    first, second = probe.compile(), probe.compile(probe.other_weights())
    other = run_all(second, probe.batch)
    same(run_all(first, probe.batch), expected, "beside another program")
    first.load_weights(probe.other_weights())
    same(run_all(second, probe.batch), other, "after weights were loaded into another program")
    first.close()
    same(run_all(second, probe.batch), other, "after another program was closed")


def closed_is_closed(probe: Probe) -> None:
    """Closing twice is allowed; a closed program refuses to run."""
    compiled = probe.compile()
    compiled.close()
    compiled.close()
    raises(NpuError, lambda: run_all(compiled, probe.batch), "a batch for a closed program")


def weights_take_effect(probe: Probe) -> None:
    """After an update a program yields what it yields compiled with those weights; one tensor or all."""
    weights = probe.other_weights()
    name = next(iter(weights))
    compiled = probe.compile()
    before = run_all(compiled, probe.batch)
    compiled.load_weights({name: weights[name]})
    one = run_all(probe.compile({name: weights[name]}), probe.batch)
    same(run_all(compiled, probe.batch), one, f"after an update of '{name}', against a fresh compilation")
    compiled.load_weights(weights)
    every = run_all(probe.compile(weights), probe.batch)
    same(run_all(compiled, probe.batch), every, "after an update of all weights, against a fresh compilation")
    if all(np.array_equal(every[layer], before[layer]) for layer in every):
        raise Broken("other weights, fresh or loaded, do not change any output")
    compiled.load_weights(probe.case.weights())
    same(run_all(compiled, probe.batch), before, "after the first weights were loaded again")


def weights_all_or_nothing(probe: Probe) -> None:
    """An update with a wrong name, shape, NaN or infinity is refused and changes nothing."""
    compiled = probe.compile()
    before = run_all(compiled, probe.batch)
    good = probe.other_weights()
    name = list(good)[-1]
    spoiled, infinite = good[name].copy(), good[name].copy()
    spoiled.flat[0], infinite.flat[-1] = np.nan, np.inf
    updates: tuple[tuple[type[NpuError], str, dict[str, Float32Array]], ...] = (
        (InvalidInput, "an unknown name", {**good, "no such weight": good[name]}),
        (InvalidInput, "another shape", {**good, name: np.zeros((*good[name].shape, 2), np.float32)}),
        (NonFiniteInput, "NaN", {**good, name: spoiled}),
        (NonFiniteInput, "infinity", {**good, name: infinite}),
    )
    for error, what, update in updates:
        raises(error, lambda update=update: compiled.load_weights(update), f"weights with {what}")  # type: ignore[misc]
        same(run_all(compiled, probe.batch), before, f"after refused weights with {what}")


def same_batch_twice(probe: Probe) -> None:
    """The same batch gives the same bits, also with another batch in between."""
    compiled = probe.compile()
    first = run_all(compiled, probe.batch)
    for turn in range(10):
        same(run_all(compiled, probe.batch), first, f"repetition {turn + 1}")
        run_all(compiled, probe.batch[::-1].copy())


def rows_are_independent(probe: Probe) -> None:
    """A sample gives the same bits in any batch."""
    compiled = probe.compile()
    whole = run_all(compiled, probe.batch)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        expected = {name: tensor[rows] for name, tensor in whole.items()}
        same(
            run_all(compiled, probe.batch[rows].copy()),
            expected,
            f"samples {rows.start} to {rows.stop - 1} alone",
        )


def taps_change_nothing(probe: Probe) -> None:
    """Which layers are tapped decides what comes, not which values; the outputs always come."""
    compiled = probe.compile()
    layers = compiled.layer_map.layers
    inputs, always = compiled.layer_map.named(probe.batch), compiled.layer_map.output_layers
    whole = compiled.run(inputs, range(len(layers)))
    for taps in ((), *((layer,) for layer in range(len(layers)))):
        got = compiled.run(inputs, taps)
        if got.keys() != always.union(taps):
            raise Broken(f"layers {sorted(got)} came for taps {taps}; due are {sorted(always.union(taps))}")
        named = {layers[i].name: tensor for i, tensor in got.items()}
        same(named, {layers[i].name: whole[i] for i in got}, f"taps {taps}")


def named_inputs_and_outputs(probe: Probe) -> None:
    """Inputs go by name, in any order; outputs come untapped, also one that other layers read."""
    if "Add" not in probe.target.capabilities.operators:
        return
    low, high = probe.ranges[INPUT]
    ranges = {**probe.ranges, OTHER_INPUT: (low / 2, high / 2), SUM: (2 * low, 2 * high)}
    compiled = probe.compile_model(with_two_inputs(probe.case), ranges)
    layer_map = compiled.layer_map
    names = {spec.name for spec in layer_map.inputs}, set(layer_map.outputs)
    if names != ({INPUT, OTHER_INPUT}, {SUM, OUTPUT}):
        raise Broken(
            f"inputs and outputs are {names}; the model's are {INPUT}, {OTHER_INPUT}, {SUM}, {OUTPUT}"
        )
    inputs = {INPUT: probe.batch, OTHER_INPUT: probe.batch[::-1].copy()}
    came = compiled.run(inputs, ())
    outputs = {layer_map.layers[i].name: tensor for i, tensor in came.items()}
    if outputs.keys() != {SUM, OUTPUT}:
        raise Broken(f"layers {sorted(outputs)} came untapped; due are {SUM} and {OUTPUT}")
    again = compiled.run(dict(reversed(inputs.items())), ())
    same({layer_map.layers[i].name: t for i, t in again.items()}, outputs, "inputs given in another order")
    alone = probe.compile_model(probe.case.model(), {**ranges, INPUT: ranges[SUM]})
    expected = run_all(alone, outputs[SUM])[OUTPUT]
    same({OUTPUT: outputs[OUTPUT]}, {OUTPUT: expected}, "fed with the sum of two inputs")


def batch_limits(probe: Probe) -> None:
    """Batches of 1 to max_batch samples run; empty, larger, misshapen or otherwise typed ones are refused."""
    compiled, largest = probe.compile(), probe.target.capabilities.max_batch
    if largest < 1:
        raise Broken(f"max_batch is {largest}; a device takes 1 sample at least")
    before = run_all(compiled, probe.batch)
    (entry,) = compiled.layer_map.inputs
    shape = entry.shape
    full = min(largest, _LARGEST_BATCH_TRIED)
    outputs = compiled.run({entry.name: np.zeros((full, *shape), np.int8)}, ())
    if {len(tensor) for tensor in outputs.values()} != {full}:
        raise Broken(f"a batch of {full} samples gives {[t.shape for t in outputs.values()]}")
    wrong: list[tuple[str, Any]] = [
        ("an empty batch", np.zeros((0, *shape), np.int8)),
        ("a batch without its last axis", np.zeros((2, *shape[:-1]), np.int8)),
        ("a batch of another shape", np.zeros((2, *shape[:-1], shape[-1] + 1), np.int8)),
        ("a batch of uint8", np.zeros((2, *shape), np.uint8)),
        ("a batch of float32", np.zeros((2, *shape), np.float32)),
    ]
    if largest < _LARGEST_BATCH_TRIED:
        wrong.append((f"a batch of max_batch + 1 = {largest + 1}", np.zeros((largest + 1, *shape), np.int8)))
    for what, batch in wrong:
        raises(InvalidInput, lambda batch=batch: compiled.run({entry.name: batch}, ()), what)  # type: ignore[misc]
    beyond = len(compiled.layer_map.layers)
    named = {entry.name: probe.batch}
    raises(InvalidInput, lambda: compiled.run(named, (beyond,)), f"a tap of layer {beyond}")
    same(run_all(compiled, probe.batch), before, "after refused batches")


def bad_models(probe: Probe) -> None:
    """Bytes that are no model and ranges that are none are refused with the right class."""
    model, ranges, target = probe.case.model(), dict(probe.ranges), probe.target
    name = next(iter(ranges))
    refusals: tuple[tuple[type[NpuError], str, bytes, dict[str, tuple[float, float]]], ...] = (
        (InvalidModel, "bytes that are no model", b"these bytes are no model", ranges),
        (InvalidModel, "half a model", model[: len(model) // 2], ranges),
        (NotCalibrated, "no ranges", model, {}),
        (InvalidInput, "a range of NaN", model, {**ranges, name: (float("nan"), 1.0)}),
        (InvalidInput, "an infinite range", model, {**ranges, name: (-1.0, float("inf"))}),
        (InvalidInput, "a range of no width", model, {**ranges, name: (1.0, 1.0)}),
    )
    for error, what, data, given in refusals:
        raises(error, lambda data=data, given=given: target.compile(data, given), what)  # type: ignore[misc]
    run_all(probe.compile(), probe.batch)


def map_is_constant(probe: Probe) -> None:
    """Loading weights does not change the layer map."""
    compiled = probe.compile()
    before = compiled.layer_map
    compiled.load_weights(probe.other_weights())
    if compiled.layer_map != before:
        raise Broken("the layer map is another after weights were loaded")


def scales_are_true(probe: Probe) -> None:
    """Dequantized by the layer map, every layer is about what the float network computes."""
    sparse = probe.sparse_weights()
    compiled = probe.compile(sparse)
    (entry,) = compiled.layer_map.quantized_inputs
    rng = np.random.default_rng(9)
    # Small inputs and few weights, so that neither a code nor a narrow accumulator overflows.
    low, high = max(entry.zero_point - 16, -128), min(entry.zero_point + 16, 127)
    batch = rng.integers(low, high + 1, (32, *entry.shape)).astype(np.int8)
    real = (batch.astype(np.float32) - entry.zero_point) * np.float32(entry.scale)
    floats = float_values(probe.with_weights(sparse).model(), real)
    outputs = run_all(compiled, batch)
    for layer in compiled.layer_map.layers:
        spec, expected = layer.output, floats[layer.name].astype(np.float64)
        got = (outputs[layer.name].astype(np.float64) - spec.zero_point) * spec.scale
        gain = float((got * expected).sum() / max(1e-12, (expected**2).sum()))
        offset_lsb = float((got - expected).mean()) / spec.scale
        if not 0.8 < gain < 1.25 or abs(offset_lsb) > 3:
            raise Broken(
                f"'{spec.name}' dequantized is {gain:.2f} times the float result and {offset_lsb:+.1f} LSB "
                "off on average; look at its scale, zero point and shape"
            )


Check = Callable[[Probe], None]


def contract_checks() -> Iterator[tuple[str, Check]]:
    """Every check that holds on any route: what it is about, and the check."""
    groups: dict[str, tuple[Check, ...]] = {
        "lifecycle": (compile_twice, side_by_side, closed_is_closed),
        "weights": (weights_take_effect, weights_all_or_nothing),
        "determinism": (same_batch_twice, rows_are_independent, taps_change_nothing),
        "signature": (named_inputs_and_outputs,),
        "limits": (batch_limits, bad_models),
        "layer map": (map_is_constant, scales_are_true),
    }
    for group, checks in groups.items():
        for check in checks:
            yield group, check
