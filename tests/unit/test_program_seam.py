"""What the server relies on between two layers, whoever asked for which of them."""

import itertools
from itertools import chain

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, random_codes, single_layer

from npu_server.conformance.cases import all_cases
from npu_server.conformance.graphs import codes, range_variants
from npu_server.execution import program
from npu_server.execution.slices import samples_at_once as at_once
from npu_server.seam import Awaited, Backend, BackendOptions, LayerTensor, LoadsInOrder, Program
from npu_wire.errors import UnsupportedModel
from npu_wire.layer_map import MemoryLayout

CHAIN = [
    helper.make_node("Relu", ["x"], ["a"], "first"),
    helper.make_node("MaxPool", ["a"], ["b"], "second", kernel_shape=[2, 2]),
    helper.make_node("Relu", ["b"], ["y"], "third"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_returns_after_each_layer(backend: type[Backend]) -> None:
    """None after a layer that nobody wants, so that a batch without taps can be given up at each of them."""
    net = single_layer("tflm", CHAIN, (2, 6, 6), {"x": Scale(0.1, 0), "a": Scale(0.1, 0), "y": Scale(0.1, 0)})
    compiled = backend(BackendOptions(profile=net.profile)).compile(net.model, net.ranges)
    batch = random_codes(np.random.default_rng(0), 2, 2, 6, 6)
    came = [tensor and tensor.layer for tensor in compiled.forward(compiled.layer_map.named(batch), (1,))]
    assert came == [None, 1, 2]
    assert [tensor and tensor.layer for tensor in compiled.forward(compiled.layer_map.named(batch), ())] == [
        None,
        None,
        2,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_computes_as_soon_as_its_own_weights_have_come(backend: type[Backend]) -> None:
    """A batch waits at the layer that lacks some; an update that is given up half way has changed nothing."""
    names = ("first.w", "second.w")
    shift = {name: np.full((1, 2, 1, 1), 1.0, np.float32) for name in names}
    nodes = [
        helper.make_node("Add", ["x", "first.w"], ["a"], "first"),
        helper.make_node("Add", ["a", "second.w"], ["y"], "second"),
    ]
    one = Scale(1.0, 0)
    net = single_layer("tflm", nodes, (2, 3, 3), {"x": one, "a": one, "y": one}, shift)
    compiled = backend(BackendOptions(profile=net.profile)).compile(net.model, net.ranges)
    assert isinstance(compiled, LoadsInOrder)
    batch = np.zeros((1, 2, 3, 3), np.int8)

    def output() -> set[int]:
        return set(list(compiled.forward(compiled.layer_map.named(batch), ()))[-1].data.ravel().tolist())  # type: ignore[union-attr]

    assert output() == {2}
    more = {name: 3 * values for name, values in shift.items()}
    given_up = compiled.begin_weights(names)
    assert list(given_up.take("first.w", more["first.w"])) == [None]
    del given_up
    assert output() == {2}

    weights = compiled.begin_weights(names)
    tensors = weights.forward(compiled.layer_map.named(batch), (0, 1))
    assert next(tensors) == next(tensors) == Awaited(0)
    assert list(weights.take("second.w", more["second.w"])) == [None]  # the order is the caller's
    assert next(tensors) == Awaited(0)
    assert list(weights.take("first.w", more["first.w"])) == [None]
    assert output() == {2}  # the others' batches run with the weights that are loaded
    came = [tensor.data for tensor in tensors if isinstance(tensor, LayerTensor)]
    assert [set(data.ravel().tolist()) for data in came] == [{3}, {6}]
    weights.finish()
    assert output() == {6}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_derives_from_two_weights_waits_for_both(backend: type[Backend]) -> None:
    """A weight computed from two initializers follows both new ones; judged by a fresh compile."""
    nodes = [
        helper.make_node("Mul", ["w", "gain"], ["scaled"], "scaling"),
        helper.make_node("Conv", ["x", "scaled"], ["a"], "first"),
        helper.make_node("Conv", ["a", "v"], ["y"], "second"),
    ]
    rng = np.random.default_rng(4)
    shapes = {"w": (3, 2, 1, 1), "gain": (3, 1, 1, 1), "v": (2, 3, 1, 1)}
    old, new = ({n: rng.normal(0, 1, s).astype(np.float32) for n, s in shapes.items()} for _ in range(2))
    scales = {"x": Scale(0.1, 0), "a": Scale(0.2, 0), "y": Scale(0.3, 0)}

    def compiled_with(weights: dict[str, npt.NDArray[np.float32]]) -> Program:
        net = single_layer("tflm", nodes, (2, 3, 3), scales, weights)
        return backend(BackendOptions(profile=net.profile)).compile(net.model, net.ranges)

    program, judge = compiled_with(old), compiled_with(new)
    assert isinstance(program, LoadsInOrder)
    batch = random_codes(rng, 2, 2, 3, 3)
    expected = [t.data for t in judge.forward(judge.layer_map.named(batch), (0, 1)) if t]
    for order in itertools.permutations(shapes):
        weights = program.begin_weights(order)
        tensors = weights.forward(program.layer_map.named(batch), (0, 1))
        came: list[LayerTensor] = []
        for name in order:
            while isinstance(item := next(tensors, None), LayerTensor):
                came.append(item)
            assert item == Awaited(len(came))
            list(weights.take(name, new[name]))
        came += [tensor for tensor in tensors if isinstance(tensor, LayerTensor)]
        for tensor, right in zip(came, expected, strict=True):
            np.testing.assert_array_equal(tensor.data, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_much_work_is_done_some_samples_at_a_time(
    backend: type[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control comes back in the middle; bits and order in memory are the whole batch's."""
    slow = backend(BackendOptions(profile="tflm"))
    capabilities = slow.open()
    for case in chain.from_iterable(all_cases()[op] for op in capabilities.operators if op in all_cases()):
        batch, ranges = codes(case.seed, case.shape), dict(range_variants(case))["calibrated"]
        try:
            whole = slow.compile(case.model(), ranges)
        except UnsupportedModel:
            continue
        taps = range(len(whole.layer_map.layers))
        expected = [t for t in whole.forward(whole.layer_map.named(batch), taps) if t]
        with monkeypatch.context() as patch:
            patch.setattr(
                program, "samples_at_once", lambda layer, layer_map, _: 4 * at_once(layer, layer_map, 1)
            )
            sliced = slow.compile(case.model(), ranges)
        came = list(sliced.forward(sliced.layer_map.named(batch), taps))
        hosted = sum(layer.host_float for layer in whole.layer_map.layers)
        assert [t and t.layer for t in came].count(None) == len(taps) - hosted, case
        for right, actual in zip(expected, filter(None, came), strict=True):
            np.testing.assert_array_equal(actual.data, right.data, err_msg=str(case))
            layout = whole.layer_map.layers[right.layer].output.layout
            last = layout is MemoryLayout.CHANNELS_LAST
            assert (np.moveaxis(actual.data, 1, -1) if last else actual.data).flags.c_contiguous
