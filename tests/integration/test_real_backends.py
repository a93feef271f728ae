"""Wire transparency: a real backend gives the same bits over the wire as in the process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from fake_backend import Start
from onnx import TensorProto, helper, numpy_helper

from npu_server.registry import create_backend
from npu_server.seam import BackendOptions
from npu_wire.errors import InvalidInput, InvalidModel, NotCalibrated, UnsupportedModel
from npu_wire.layer_map import Int8Array
from trainer_client.npu.connection import connect

RANGES = {
    "x": (-1.0, 1.0),
    "a": (-3.0, 3.0),
    "r": (0.0, 3.0),
    "p": (0.0, 2.0),
    "f": (0.0, 2.0),
    "y": (-4.0, 4.0),
}
OPTIONS = BackendOptions(profile="tflm", threads=1)


def weights(seed: int) -> dict[str, np.ndarray]:
    """Initializers of the model."""
    rng = np.random.default_rng(seed)
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "fc.weight": (5, 4), "fc.bias": (5,)}
    return {name: (rng.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def model(last: str = "Gemm") -> bytes:
    """Conv, Relu, GlobalAveragePool, Flatten, Gemm on (n, 3, 8, 8)."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node(last, ["f", "fc.weight", "fc.bias"], ["y"], "fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights(0).items()],
    )
    proto: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    return bytes(proto.SerializeToString())


@pytest.fixture
def images() -> Int8Array:
    """Six samples of random codes."""
    return np.random.default_rng(3).integers(-128, 128, (6, 3, 8, 8), dtype=np.int8)


@pytest.mark.parametrize("name", ["reference", "emulator"])
def test_equal_bits_in_the_process_and_over_the_wire(start: Start, images: Int8Array, name: str) -> None:
    """Every layer, with the compiled weights and after two updates; judged by `reference` in this process."""
    judge = create_backend("reference", OPTIONS)
    judge.open()
    program = judge.compile(model(), RANGES)
    with connect(start(create_backend(name, OPTIONS)).address) as npu:
        session = npu.compile(model(), RANGES)
        if name == "reference":  # another backend may choose another memory layout, and nothing else
            assert session.layer_map == program.layer_map
        taps = range(len(program.layer_map.layers))
        for update in ({}, weights(1), {"conv.bias": weights(2)["conv.bias"]}):
            program.load_weights(update)
            session.push_weights(update)
            pending = session.submit(session.layer_map.named(images), taps)
            for tensor in filter(None, program.forward(program.layer_map.named(images), taps)):
                np.testing.assert_array_equal(tensor.data, pending.tensor(tensor.layer))


@pytest.mark.parametrize("name", ["reference", "emulator"])
def test_equal_bits_where_sessions_take_turns(start: Start, images: Int8Array, name: str) -> None:
    """Three clients' batches and updates cross layer by layer, beside a fourth's models that compile."""
    address = start(create_backend(name, OPTIONS)).address
    started, over = threading.Barrier(4), threading.Event()

    def train(seed: int) -> list[Int8Array]:
        with connect(address) as npu:
            session = npu.compile(model(), RANGES)
            taps = range(len(session.layer_map.layers))
            started.wait(30)
            pending = []
            for step in range(10):
                session.push_weights(weights(100 * seed + step))
                pending.append(session.submit(session.layer_map.named(images), taps))
            return [answer.tensor(tap) for answer in pending for tap in taps]

    def compile_on() -> None:
        with connect(address) as npu:
            started.wait(30)
            while not over.is_set():
                npu.compile(model(), RANGES).close()

    with ThreadPoolExecutor() as pool:
        compiling = pool.submit(compile_on)
        try:
            answers = list(pool.map(train, range(3)))
        finally:
            over.set()
        compiling.result()
    judge = create_backend("reference", OPTIONS)
    judge.open()
    program = judge.compile(model(), RANGES)
    for seed, tensors in enumerate(answers):
        expected = []
        for step in range(10):
            program.load_weights(weights(100 * seed + step))
            expected += [
                t.data
                for t in program.forward(
                    program.layer_map.named(images), range(len(program.layer_map.layers))
                )
                if t
            ]
        for right, answer in zip(expected, tensors, strict=True):
            np.testing.assert_array_equal(right, answer)


def test_refusals_of_a_real_compiler(start: Start) -> None:
    """Class by class: unreadable, unsupported, not calibrated."""
    with connect(start(create_backend("reference", OPTIONS)).address) as npu:
        with pytest.raises(InvalidModel):
            npu.compile(b"these bytes are no model", RANGES)
        with pytest.raises((UnsupportedModel, InvalidModel), match="Frobnicate"):
            npu.compile(model(last="Frobnicate"), RANGES)
        with pytest.raises(NotCalibrated):
            npu.compile(model(), {"x": (-1.0, 1.0)})


@pytest.mark.parametrize(("name", "shape"), [("nonesuch", (1,)), ("conv.bias", (3,))])
def test_refused_weights_of_a_real_program(
    start: Start, images: Int8Array, name: str, shape: tuple[int, ...]
) -> None:
    """A name and a shape that were not compiled."""
    with connect(start(create_backend("reference", OPTIONS)).address) as npu:
        session = npu.compile(model(), RANGES)
        session.push_weights({name: np.zeros(shape, np.float32)})
        with pytest.raises(InvalidInput, match=name):
            session.submit(session.layer_map.named(images), ()).tensor(len(session.layer_map.layers) - 1)
