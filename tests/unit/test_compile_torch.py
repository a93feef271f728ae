"""Networks as torch.onnx exports them: they compile, both backends agree, and INT8 stays close to float."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from single_layers import BACKENDS
from torch import nn

from npu_server.seam import BackendOptions
from npu_wire.quantize import dequantize, quantize


def conv_bn(
    inner: int, out: int, kernel: int, act: nn.Module | None, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers = [
        nn.Conv2d(inner, out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([act] if act else []))


class ResNetLike(nn.Module):
    """Stem with max pool, a residual block with a projection, global average, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, 8, 7, nn.ReLU(), 2), nn.MaxPool2d(3, 2, 1))
        self.branch = nn.Sequential(conv_bn(8, 16, 3, nn.ReLU(), 2), conv_bn(16, 16, 3, None))
        self.shortcut = conv_bn(8, 16, 1, None, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.branch(x) + self.shortcut(x))
        return self.fc(torch.flatten(self.pool(x), 1))


class MobileNetV2Like(nn.Module):
    """Inverted residuals with ReLU6; dropout; mean over axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, nn.ReLU6(), 2)
        expand, depthwise = conv_bn(8, 24, 1, nn.ReLU6()), conv_bn(24, 24, 3, nn.ReLU6(), groups=24)
        self.block = nn.Sequential(expand, depthwise, conv_bn(24, 8, 1, None))
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        return self.head(x.mean([2, 3]))


class MobileNetV3Like(nn.Module):
    """Hard swish as a module and written out, squeeze-and-excite with a hard sigmoid of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, nn.Hardswish(), 2)
        self.depthwise = conv_bn(8, 8, 5, None, groups=8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(x))
        x = x * F.relu6(x + 3) / 6
        gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
        x = x * F.hardsigmoid(gate) + x * (F.relu6(gate + 3.0) / 6.0)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class EfficientNetLike(nn.Module):
    """SiLU, squeeze-and-excite with a sigmoid, TensorFlow's asymmetric padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, nn.SiLU())
        self.reduce, self.expand, self.project = (
            nn.Conv2d(8, 2, 1),
            nn.Conv2d(2, 8, 1),
            conv_bn(8, 8, 1, None),
        )
        self.down = nn.Conv2d(8, 12, 3, 2, bias=False)
        self.fc = nn.Linear(12, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))))
        x = self.project(x * gate) + x
        x = self.down(F.pad(x, (0, 1, 0, 1)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mixed(nn.Module):
    """Concatenation, average pools, constants per channel, reshape, batch norm before any convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1))
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.fc = nn.Linear(10 * 25, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm((x - self.mean) / 0.25)
        x = torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], 1)
        x = F.avg_pool2d(x, 3, 2, 1) + F.max_pool2d(x, 2)
        x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False, ceil_mode=True)
        return self.fc(x.reshape(x.shape[0], -1)).clamp(-2, 2)


NETS = {net.__name__: net for net in (ResNetLike, MobileNetV2Like, MobileNetV3Like, EfficientNetLike, Mixed)}
SIZE = 16


@functools.cache
def captured(name: str) -> tuple[bytes, dict[str, np.ndarray], np.ndarray]:
    """ONNX bytes, float value of every node by name, and the input that they belong to."""
    torch.manual_seed(1)
    net = NETS[name]()
    images = torch.rand(8, 3, SIZE, SIZE)
    for _ in range(20):  # running statistics that fit the data
        net.train()(images)
    net.eval()
    exported = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    program = torch.onnx.export(exported, dynamo=True, optimize=False, opset_version=20, verbose=False)
    values: dict[str, np.ndarray] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                values[node.name] = result.numpy(force=True)
            return result

    with torch.no_grad():
        Recorder(program.exported_program.module()).run(images)
    return program.model_proto.SerializeToString(), values, images.numpy()


def ranges_of(values: dict[str, np.ndarray], images: np.ndarray) -> dict[str, tuple[float, float]]:
    """Min and max of every value that varies."""
    seen = {**values, "x": images}
    return {n: (float(v.min()), float(v.max())) for n, v in seen.items() if v.size and v.min() < v.max()}


@pytest.mark.parametrize("name", NETS)
def test_int8_is_close_to_float(name: str) -> None:
    """With 8 bits and TFLite's rules every layer keeps more than 20 dB of the float network's signal."""
    model, values, images = captured(name)
    for backend in BACKENDS:
        program = backend(BackendOptions(profile="tflm")).compile(model, ranges_of(values, images))
        layers, entry = program.layer_map.layers, program.layer_map.inputs[0]
        for tensor in filter(
            None,
            program.forward(
                program.layer_map.named(quantize(images, entry.scale, entry.zero_point)), range(len(layers))
            ),
        ):
            spec = layers[tensor.layer].output
            noise = dequantize(tensor.data, spec.scale, spec.zero_point) - values[spec.name]
            sqnr_db = 10 * np.log10(np.square(values[spec.name]).mean() / np.square(noise).mean())
            assert sqnr_db > 20, f"{spec.name}: {sqnr_db:.1f} dB"


@pytest.mark.parametrize("profile", ["onnxruntime", "pow2-trunc", "acc16"])
@pytest.mark.parametrize("name", NETS)
def test_backends_agree(name: str, profile: str) -> None:
    """Emulator and reference yield the same bits under every profile."""
    model, values, images = captured(name)
    programs = [
        b(BackendOptions(profile=profile)).compile(model, ranges_of(values, images)) for b in BACKENDS
    ]
    entry = programs[0].layer_map.inputs[0]
    batch = quantize(images, entry.scale, entry.zero_point)
    taps = range(len(programs[0].layer_map.layers))
    for expected, *others in zip(
        *(filter(None, p.forward(p.layer_map.named(batch), taps)) for p in programs), strict=True
    ):
        for actual in others:
            np.testing.assert_array_equal(actual.data, expected.data)


def test_layers_are_fused() -> None:
    """Convolution, batch norm and ReLU6 are one layer under the last one's name; dropout vanishes."""
    model, values, images = captured("MobileNetV2Like")
    program = BACKENDS[0](BackendOptions(profile="tflm")).compile(model, ranges_of(values, images))
    layers = program.layer_map.layers
    assert [layer.op for layer in layers] == ["Conv", "Conv", "Conv", "Conv", "Add", "Mean", "Gemm"]
    assert layers[0].name == "hardtanh"
    assert len(layers[0].fused_nodes) == 3
    assert layers[0].parameters == (
        "stem.0.weight",
        "stem.1.bias",
        "stem.1.running_mean",
        "stem.1.running_var",
        "stem.1.weight",
    )
    assert layers[0].saturation_low == -129
    assert layers[-1].inputs == (layers[-2].name,)


def test_functions_become_one_table() -> None:
    """Hard swish, SiLU and hard sigmoid are one table each, however they are written."""
    for name, tables in (("MobileNetV3Like", 4), ("EfficientNetLike", 3)):
        model, values, images = captured(name)
        program = BACKENDS[0](BackendOptions(profile="tflm")).compile(model, ranges_of(values, images))
        assert sum(layer.op == "Lut" for layer in program.layer_map.layers) == tables


def test_weights_follow_the_module() -> None:
    """After an update of all parameters the program equals one compiled from the new model."""
    model, values, images = captured("ResNetLike")
    ranges = ranges_of(values, images)
    torch.manual_seed(2)
    update = {
        n: t.numpy(force=True) for n, t in ResNetLike().state_dict().items() if t.dtype == torch.float32
    }
    for backend in BACKENDS:
        program = backend(BackendOptions(profile="tflm")).compile(model, ranges)
        entry = program.layer_map.inputs[0]
        batch = quantize(images, entry.scale, entry.zero_point)
        before = list(program.forward(program.layer_map.named(batch), ()))[-1].data.copy()
        program.load_weights({n: update[n] for layer in program.layer_map.layers for n in layer.parameters})
        fresh = backend(BackendOptions(profile="tflm")).compile(with_weights(model, update), ranges)
        after = list(program.forward(program.layer_map.named(batch), ()))[-1].data
        np.testing.assert_array_equal(after, list(fresh.forward(fresh.layer_map.named(batch), ()))[-1].data)
        assert (after != before).any()


def with_weights(model: bytes, tensors: dict[str, np.ndarray]) -> bytes:
    """The model with other initializers."""
    import onnx

    proto = onnx.load_from_string(model)
    for initializer in proto.graph.initializer:
        if initializer.name in tensors:
            initializer.CopyFrom(onnx.numpy_helper.from_array(tensors[initializer.name], initializer.name))
    return proto.SerializeToString()
