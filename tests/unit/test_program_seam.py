"""What the server relies on between two layers, whoever asked for which of them."""

from itertools import chain

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, random_codes, single_layer

from npu_server.conformance.cases import all_cases
from npu_server.conformance.graphs import codes, range_variants
from npu_server.execution import program
from npu_server.execution.slices import samples_at_once as at_once
from npu_server.seam import Backend, BackendOptions, LoadsInSteps
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
def test_weights_change_when_all_their_steps_are_done(backend: type[Backend]) -> None:
    """A step a layer; an update that is given up half way has changed nothing, and the next one counts."""
    names = ("first.w", "second.w")
    shift = {name: np.full((1, 2, 1, 1), 1.0, np.float32) for name in names}
    nodes = [
        helper.make_node("Add", ["x", "first.w"], ["a"], "first"),
        helper.make_node("Add", ["a", "second.w"], ["y"], "second"),
    ]
    one = Scale(1.0, 0)
    net = single_layer("tflm", nodes, (2, 3, 3), {"x": one, "a": one, "y": one}, shift)
    compiled = backend(BackendOptions(profile=net.profile)).compile(net.model, net.ranges)
    assert isinstance(compiled, LoadsInSteps)
    batch = np.zeros((1, 2, 3, 3), np.int8)

    def output() -> set[int]:
        return set(list(compiled.forward(compiled.layer_map.named(batch), ()))[-1].data.ravel().tolist())  # type: ignore[union-attr]

    assert output() == {2}
    more = {name: 3 * values for name, values in shift.items()}
    steps = compiled.load_weights_in_steps(more)
    next(steps)
    del steps
    assert output() == {2}
    assert list(compiled.load_weights_in_steps(more)) == [None, None]
    assert output() == {6}


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
