"""A pooling window in ceil_mode may be larger than its input: some networks pool the whole image so."""

import numpy as np
import pytest
import torch
from torch import nn

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from npu_wire.quantize import dequantize, quantize
from trainer_client.qat.calibrate import observe
from trainer_client.qat.capture import capture


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(1280, ceil_mode=True), nn.MaxPool2d((7, 1280), ceil_mode=True)]
)
@pytest.mark.parametrize("backend", [ReferenceBackend, EmulatorBackend])
def test_the_window_ends_with_the_input(pool: nn.Module, backend: type) -> None:
    """The result is torch's own, up to the rounding of one code."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 2, 5)
    captured = capture(pool, images)
    program = backend(BackendOptions(profile="tflm")).compile(captured.onnx, observe(captured, images))
    entry = program.layer_map.inputs[0]
    codes = quantize(images.numpy(), entry.scale, entry.zero_point)
    (tensor,) = program.forward(program.layer_map.named(codes), ())
    seen = torch.from_numpy(dequantize(codes, entry.scale, entry.zero_point))
    output = program.layer_map.tensors[program.layer_map.outputs[0]]
    actual = dequantize(tensor.data, output.scale, output.zero_point)
    np.testing.assert_allclose(actual, pool(seen).numpy(), atol=0.51 * output.scale)
