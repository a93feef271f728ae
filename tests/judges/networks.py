"""Whole networks, layer by layer, each layer on what the judge itself made of the one before."""

from collections.abc import Callable, Iterator

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from npu_server.numerics.profile import Profile
from npu_wire.layer_map import Int8Array

from .cell import Cell
from .exemptions import operator_of
from .layers import Judge, Unjudged, compile_layers, our_outputs
from .matrix import compare


class _Net:
    """A float ONNX model with random weights."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list = []
        self.constants = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}

    def node(self, op: str, inputs: list[str], **attributes: object) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"node_{len(self.nodes)}", **attributes))
        return name

    def constant(self, *shape: int, std: float) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = self.rng.normal(0, std, shape).astype(np.float32)
        return name

    def conv(
        self, x: str, channels: int, out: int, size: int, stride: int = 1, groups: int = 1, act: str = ""
    ) -> str:
        inner = channels // groups
        weight = self.constant(out, inner, size, size, std=np.sqrt(2 / (inner * size * size)))
        pads = [size // 2] * 4
        fields = {"strides": [stride, stride], "pads": pads, "group": groups}
        y = self.node("Conv", [x, weight, self.constant(out, std=0.1)], **fields)
        if act == "relu6":
            return self.node("Clip", [y, "zero", "six"])
        return self.node("Relu", [y]) if act == "relu" else y

    def head(self, x: str, channels: int) -> str:
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [x])])
        weight = self.constant(100, channels, std=np.sqrt(1 / channels))
        return self.node("Gemm", [flat, weight, self.constant(100, std=0.1)], transB=1)

    def model(self, output: str, side: int) -> ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, side, side])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "classes"])],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def mobilenet_v2(side: int = 96) -> ModelProto:
    """MobileNetV2 of width 1, 52 convolutions (Sandler et al., 2018, table 2)."""
    net = _Net(1)
    x, channels = net.conv("x", 3, 32, 3, 2, act="relu6"), 32
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    for expand, out, repeats, first_stride in [*plan, (6, 320, 1, 1)]:
        for repeat in range(repeats):
            stride, wide, y = first_stride if repeat == 0 else 1, channels * expand, x
            if expand > 1:
                y = net.conv(y, channels, wide, 1, act="relu6")
            y = net.conv(y, wide, wide, 3, stride, wide, "relu6")
            y = net.conv(y, wide, out, 1)
            x = net.node("Add", [x, y]) if stride == 1 and channels == out else y
            channels = out
    return net.model(net.head(net.conv(x, channels, 1280, 1, act="relu6"), 1280), side)


def resnet_18(side: int = 64) -> ModelProto:
    """ResNet18 of half its width (He et al., 2015, table 1)."""
    net = _Net(2)
    x, channels = net.conv("x", 3, 32, 7, 2, act="relu"), 32
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")
    for stage, out in enumerate((32, 64, 128, 256)):
        for block in range(2):
            stride = 2 if stage and block == 0 else 1
            y = net.conv(x, channels, out, 3, stride, act="relu")
            y = net.conv(y, out, out, 3)
            shortcut = net.conv(x, channels, out, 1, stride) if stride == 2 else x
            x = net.node("Relu", [net.node("Add", [y, shortcut])])
            channels = out
    return net.model(net.head(x, channels), side)


NETWORKS: dict[str, Callable[[], ModelProto]] = {"MobileNetV2@96": mobilenet_v2, "ResNet18@64": resnet_18}


def ranges(model: ModelProto, images: np.ndarray) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every activation, by ONNX Runtime in float."""
    every = ModelProto.FromString(model.SerializeToString())
    names = [node.output[0] for node in every.graph.node]
    del every.graph.output[:]
    every.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    results = onnxruntime.InferenceSession(every.SerializeToString(), options).run(None, {"x": images})
    pairs = zip(["x", *names], [images, *results], strict=True)
    return {name: (float(value.min()), float(value.max())) for name, value in pairs}


def judge_network(model: ModelProto, profile: Profile, judge: Judge, batch: int = 1) -> Iterator[Cell]:
    """A cell for each layer that the judge computes; what the profile does not claim it takes as given."""
    rng = np.random.default_rng(3)
    side = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    images = rng.normal(0, 1, (batch, 3, side, side)).astype(np.float32)
    found = ranges(model, images)
    layers = compile_layers(model.SerializeToString(), found, profile)
    tensors: dict[str, Int8Array] = {"x": rng.integers(-128, 128, images.shape).astype(np.int8)}
    for judged in layers:
        spec = judged.layer.spec
        inputs = [tensors[name] for name in spec.inputs]
        try:
            if operator_of(judged) in profile.unjudged:
                raise Unjudged("the profile claims nothing here")
            tensors[spec.name] = judge.run(judged, inputs)
            yield compare(judged, inputs, judge, profile, tensors[spec.name])
        except Unjudged:
            tensors[spec.name] = our_outputs(judged, inputs, profile)[0]
