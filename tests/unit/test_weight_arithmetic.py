"""What the server computes from parameters before it quantizes: judged by ONNX Runtime, update by update."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from in_process_npu import InProcessNpu
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from npu_server.backends.emulator import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.graph import Conv
from npu_server.compile.planning.weights import fold
from npu_server.compile.reading.model import read_model
from npu_server.compile.reading.operators import import_model
from npu_server.seam import Backend, BackendOptions
from npu_wire.errors import UnsupportedModel
from npu_wire.layer_map import Float32Array, LayerMap
from trainer_client.qat.module import prepare

BACKENDS = (ReferenceBackend, EmulatorBackend)
RNG = np.random.default_rng(3)


def numbers(*shape: int) -> Float32Array:
    """A float32 constant."""
    return RNG.normal(0, 1, shape).astype(np.float32)


def model(nodes: list, shape: tuple[int, ...], constants: dict[str, np.ndarray]) -> bytes:
    """A model from "x" to "y"."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *shape])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def exact(data: bytes, layer_map: LayerMap, codes: np.ndarray) -> np.ndarray:
    """ONNX Runtime's float result on what the codes stand for, in steps of the output's code."""
    entry, out = layer_map.inputs[0], layer_map.tensors[layer_map.outputs[0]]
    x = ((codes.astype(np.float64) - entry.zero_point) * entry.scale).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return np.clip(y / out.scale + out.zero_point, -128, 127)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_for_each_sample_keeps_that_under_another_type(backend: type[Backend]) -> None:
    """Numbers that are made as often as there are samples, cast to a weight's type, and added."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Expand", ["whole", "shape"], ["many"]),
        helper.make_node("CastLike", ["many", "weight"], ["real"]),
        helper.make_node("Mul", ["real", "weight"], ["scaled"]),
        helper.make_node("Add", ["x", "scaled"], ["y"], "add"),
    ]
    data = model(nodes, (3,), {"whole": np.array([1, -2, 3]), "weight": np.array(0.5, np.float32)})
    program = backend(BackendOptions(profile="tflm")).compile(data, {"x": (-2.0, 2.0), "y": (-3.0, 4.0)})
    codes = RNG.integers(-128, 128, (5, 3)).astype(np.int8)
    (y,) = [t.data for t in program.forward({"x": codes}, [len(program.layer_map.layers) - 1]) if t]
    assert np.abs(y - exact(data, program.layer_map, codes)).max() <= 1.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["Clip", "Min"])
def test_a_trained_clipping_bound_follows_its_updates(backend: type[Backend], op: str) -> None:
    """PACT: where the bound falls, outputs are cut off lower; the layer map names it as a parameter."""
    inputs = ["x", "zero", "alpha"] if op == "Clip" else ["x", "alpha"]
    nodes = [helper.make_node(op, inputs, ["y"], "clip")]
    constants = {"zero": np.array(0, np.float32), "alpha": np.array(2.5, np.float32)}
    program = backend(BackendOptions(profile="tflm")).compile(
        model(nodes, (3, 5), constants), {"x": (-4.0, 4.0), "y": (-4.0, 2.5)}
    )
    layer = program.layer_map.layers[0]
    assert "alpha" in layer.parameters
    assert layer.saturation_high == 128  # the gradient of the bound comes from just there
    codes = np.arange(-128, 127, dtype=np.int8).reshape(17, 3, 5)
    for alpha in (2.5, 1.25):
        constants["alpha"] = np.array(alpha, np.float32)
        program.load_weights({"alpha": constants["alpha"]})
        (tensor,) = (t for t in program.forward(program.layer_map.named(codes), ()) if t is not None)
        expected = exact(model(nodes, (3, 5), constants), program.layer_map, codes)
        assert np.abs(tensor.data - expected).max() <= 0.5001


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    """An operator; inputs separated by blanks."""
    return helper.make_node(op, inputs.split(), output.split(), f"{op}_{output}", **attributes)


ROW = np.array([1, 4, -1], np.int64)
DERIVED: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "weight normalization": (
        [node("ReduceL2", "v axes", "n", keepdims=1), node("Div", "v n", "u"), node("Mul", "u g", "w")],
        {"v": numbers(4, 3, 3, 3), "g": numbers(4, 1, 1, 1), "axes": np.array([1, 2, 3])},
    ),
    "standardization by a batch norm (BiT)": (
        [
            node("Reshape", "v row", "flat"),
            node(
                "BatchNormalization", "flat ones zeros zeros ones", "s rm rv", training_mode=1, epsilon=1e-5
            ),
            node("Reshape", "s shape", "w"),
        ],
        {
            "v": numbers(4, 3, 3, 3),
            "row": ROW,
            "shape": np.array([4, 3, 3, 3]),
            "ones": np.ones(4, np.float32),
            "zeros": np.zeros(4, np.float32),
        },
    ),
    "a product of small ones (LoRA)": (
        [node("Einsum", "v b", "d", equation="or,rihw->oihw"), node("Gelu", "d", "w")],
        {"v": numbers(4, 2), "b": numbers(2, 3, 3, 3)},
    ),
    "spectral normalization": (
        [
            node("Reshape", "v matrix", "m"),
            node("MatMul", "m right", "mv"),
            node("MatMul", "left mv", "sigma"),
            node("Div", "v sigma", "w"),
        ],
        {
            "v": numbers(4, 3, 3, 3),
            "matrix": np.array([4, 27]),
            "right": numbers(27),
            "left": numbers(4),
        },
    ),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_weight_is_what_onnx_runtime_computes(name: str) -> None:
    """The weight that the layer quantizes, before and after an update of what it derives from."""
    nodes, constants = DERIVED[name]
    data = model([*nodes, node("Conv", "x w", "y")], (3, 6, 6), constants)
    imported, known = import_model(read_model(data))
    (convolution,) = imported.operations
    assert isinstance(convolution.operator, Conv)
    for factor in (1.0, -1.5):
        update = {"v": (constants["v"] * np.float32(factor)).astype(np.float32)}
        changed = known.branch()
        changed.take("v", update["v"], awaited=())
        weight, _ = fold(convolution.operator, changed)
        graph = helper.make_graph(
            nodes,
            "weight",
            [],
            [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3])],
            [numpy_helper.from_array(array, key) for key, array in (constants | update).items()],
        )
        alone = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(weight, session.run(None, {})[0], rtol=5e-6, atol=1e-6)


def test_what_is_random_is_no_weight() -> None:
    """A weight that would be another one at each compile is refused by its node."""
    nodes = [node("RandomNormal", "", "w", shape=[4, 3, 3, 3]), node("Conv", "x w", "y")]
    with pytest.raises(UnsupportedModel, match=r"\(RandomNormal\)"):
        import_model(read_model(model(nodes, (3, 6, 6), {})))


class Standardized(nn.Conv2d):
    """Hugging Face's BiT."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves with the standardized weight."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return nn.functional.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Clipped(nn.Conv2d):
    """PACT."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.alpha = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        """Clips at a learned bound."""
        return torch.clamp(super().forward(x), torch.zeros_like(self.alpha), self.alpha)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "standardized", "pact"])
def test_raw_parameters_train_through_the_npu(kind: str) -> None:
    """Gradients reach what the weight derives from, the NPU follows it, training forward is evaluation."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "weight_norm": weight_norm(nn.Conv2d(3, 6, 3)),
        "spectral_norm": spectral_norm(nn.Conv2d(3, 6, 3)),
        "standardized": Standardized(3, 6, 3),
        "pact": Clipped(3, 6, 3),
    }
    net = nn.Sequential(layers[kind], nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)).eval()
    backend = EmulatorBackend(BackendOptions(profile="tflm"))
    backend.open()
    x = torch.randn(8, 3, 6, 6)
    qat = prepare(net, x, InProcessNpu(backend)).calibrate([x])
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    error = float((qat.eval()(x) - net(x)).square().mean() / net(x).var())
    assert error < 2e-3
    outputs = []
    for _ in range(3):
        qat.train()
        optimizer.zero_grad()
        value = qat(x)
        nn.functional.cross_entropy(value, torch.arange(8) % 4).backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in net[0].parameters() if p.requires_grad)
        assert torch.equal(qat.eval()(x), value)
        outputs.append(value.detach())
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[2])
