"""What the server relies on between two layers, whoever asked for which of them."""

import numpy as np
import pytest
from onnx import helper
from single_layers import BACKENDS, Scale, random_codes, single_layer

from npu_server.backends.base import Backend, BackendOptions

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
