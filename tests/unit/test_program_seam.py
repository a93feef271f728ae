"""What the server relies on between two layers, whoever asked for which of them."""

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, random_codes, single_layer

from npu_server.backends.base import Backend, BackendOptions, LoadsInSteps

CHAIN = [
    helper.make_node("Relu", ["x"], ["a"], "first"),
    helper.make_node("MaxPool", ["a"], ["b"], "second", kernel_shape=[2, 2]),
    helper.make_node("Relu", ["b"], ["y"], "third"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_returns_after_each_layer(backend: type[Backend]) -> None:
    """None after a layer that nobody wants, so that a batch without taps can be given up at each of them."""
    net = single_layer("tflm", CHAIN, (2, 6, 6), {"x": Scale(0.1, 0), "a": Scale(0.1, 0), "y": Scale(0.1, 0)})
    program = backend(BackendOptions(profile=net.profile)).compile(net.model, net.ranges)
    batch = random_codes(np.random.default_rng(0), 2, 2, 6, 6)
    came = [tensor and tensor.layer for tensor in program.forward(batch, (1,))]
    assert came == [None, 1, 2]
    assert [tensor and tensor.layer for tensor in program.forward(batch, ())] == [None, None, 2]


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
    program = backend(BackendOptions(profile=net.profile)).compile(net.model, net.ranges)
    assert isinstance(program, LoadsInSteps)
    batch = np.zeros((1, 2, 3, 3), np.int8)

    def output() -> set[int]:
        return set(list(program.forward(batch, ()))[-1].data.ravel().tolist())  # type: ignore[union-attr]

    assert output() == {2}
    more = {name: 3 * values for name, values in shift.items()}
    steps = program.load_weights_in_steps(more)
    next(steps)
    del steps
    assert output() == {2}
    assert list(program.load_weights_in_steps(more)) == [None, None]
    assert output() == {6}
