"""Blocks of today's networks, captured by the trainer, compiled, and trained for a step."""

import functools

import numpy as np
import pytest
import torch
from blocks import BLOCKS
from in_process_npu import InProcessNpu
from torch import Tensor

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.seam import BackendOptions
from trainer_client.qat.calibrate import observe
from trainer_client.qat.capture import Captured, capture
from trainer_client.qat.module import prepare

# Decibels of signal over quantization noise at the output; a layer that computes something else is far below.
LOWEST_SQNR_DB = {"tflm": 20.0, "onnxruntime": 20.0, "pow2-trunc": 12.0, "acc18": 20.0}


def samples(name: str, count: int, seed: int = 0) -> Tensor:
    """Inputs of a block."""
    return torch.randn(count, *BLOCKS[name][1], generator=torch.Generator().manual_seed(seed))


@functools.cache
def captured(name: str) -> Captured:
    """A captured block."""
    torch.manual_seed(0)
    return capture(BLOCKS[name][0]().eval(), samples(name, 2))


@pytest.mark.parametrize("profile", LOWEST_SQNR_DB)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_equal_on_both_backends_and_close_to_float(name: str, profile: str) -> None:
    """Every tensor is bit-equal, and the output is torch's own but for quantization noise."""
    block, x = captured(name), samples(name, 4)
    ranges = observe(block, x)
    programs = [
        backend(BackendOptions(profile=profile)).compile(block.onnx, ranges)
        for backend in (ReferenceBackend, EmulatorBackend)
    ]
    layer_map = programs[0].layer_map
    entry = layer_map.inputs[0]
    batch = np.clip(np.rint(x.numpy() / entry.scale) + entry.zero_point, -128, 127).astype(np.int8)
    taps = range(len(layer_map.layers))
    for expected, actual in zip(
        *(filter(None, p.forward(p.layer_map.named(batch), taps)) for p in programs), strict=True
    ):
        layer = layer_map.layers[expected.layer]
        assert actual.data.shape == (4, *layer.output.shape)
        np.testing.assert_array_equal(actual.data, expected.data, err_msg=f"{layer.op} {layer.name}")
    with torch.no_grad():
        exact = block.model(x).numpy()
    spec = layer_map.tensors[layer_map.outputs[0]]
    noise = (actual.data.astype(np.float64) - spec.zero_point) * spec.scale - exact
    assert 10 * np.log10(np.square(exact).sum() / np.square(noise).sum()) > LOWEST_SQNR_DB[profile]


@pytest.mark.parametrize("name", BLOCKS)
def test_block_trains(name: str) -> None:
    """A training step's value is what the NPU alone computes; every parameter gets a finite gradient."""
    torch.manual_seed(0)
    model = BLOCKS[name][0]()
    x = samples(name, 4, seed=1)
    qat = prepare(model, x, InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm")))).calibrate(x)
    output = qat(x)
    output.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    assert torch.equal(qat.eval()(x), output.detach())


@pytest.mark.parametrize("name", ["torch_attention", "vit"])
def test_every_layer_differs_from_float_by_little(name: str) -> None:
    """Each FP32 layer on the NPU's own inputs is within a few LSB: no tensor is injected transposed."""
    torch.manual_seed(0)
    x = samples(name, 4, seed=1)
    npu = InProcessNpu(EmulatorBackend(BackendOptions(profile="tflm")))
    qat = prepare(BLOCKS[name][0](), x, npu).calibrate(x)
    qat(x)
    assert any(layer.output.outer > 1 and not layer.moves_data_only for layer in qat.layer_map.layers)
    for layer, noise in qat.noise.layers.items():
        assert noise.max_noise_lsb < 4, layer
