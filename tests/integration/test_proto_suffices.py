"""What proto/ says is enough to write a client, and is what the server does."""

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from fake_backend import Start
from hostile_models import good
from proto_client import ProtoClient, batch, dequantize, quantize, weights

from npu_server.registry import create_backend
from npu_server.seam import BackendOptions, Program
from npu_wire import errors
from npu_wire.v1 import npu_pb2, program_pb2

_PROTO = Path(__file__).parents[2] / "proto" / "npu_wire" / "v1"
_RANGES = {name: (-2.0, 2.0) for name in ("x", "a", "b", "c", "d", "y")}
Codes = npt.NDArray[np.int8]


@pytest.fixture
def client(start: Start) -> Iterator[ProtoClient]:
    """A client of a server with the emulator."""
    server = start(create_backend("emulator", BackendOptions(profile="tflm", threads=1)))
    proto_client = ProtoClient(server.address)
    yield proto_client
    proto_client.close()


@pytest.fixture
def program() -> Iterator[Program]:
    """The same model in this process, on `reference`."""
    backend = create_backend("reference", BackendOptions(profile="tflm", threads=1))
    backend.open()
    compiled = backend.compile(good().SerializeToString(), _RANGES)
    yield compiled
    compiled.close()
    backend.close()


def onnx_quantize(x: npt.NDArray[np.float32], spec: program_pb2.TensorSpec) -> Codes:
    """ONNX Runtime's QuantizeLinear."""
    node = onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"])
    graph = onnx.helper.make_graph(
        [node],
        "quantize",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("q", onnx.TensorProto.INT8, x.shape)],
        [
            onnx.numpy_helper.from_array(np.float32(spec.scale), "scale"),
            onnx.numpy_helper.from_array(np.int8(spec.zero_point), "zero_point"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (codes,) = session.run(["q"], {"x": x})
    assert isinstance(codes, np.ndarray)
    return codes


def by_reference(program: Program, codes: Codes) -> dict[int, Codes]:
    """Every layer's output."""
    every = range(len(program.layer_map.layers))
    return {
        tensor.layer: np.array(tensor.data)
        for tensor in program.forward(program.layer_map.named(codes), every)
        if tensor
    }


def test_a_client_written_from_the_proto_trains_a_step(client: ProtoClient, program: Program) -> None:
    """Input codes are ONNX Runtime's, every layer's bits `reference`'s, before and after the step."""
    model = good()
    head = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "fc")
    opened = client.compile(model.SerializeToString(), _RANGES)
    every = range(len(opened.layers))
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1.2, (6, 3, 8, 8)).astype(np.float32)
    x.flat[:40] = (np.arange(40) - 20 + 0.5) * np.float32(
        opened.inputs[0].quantized.scale
    )  # ties, and beyond the range
    x.flat[40:42] = -1e30, 1e30
    codes = quantize(x, opened.inputs[0].quantized)
    np.testing.assert_array_equal(codes, onnx_quantize(x, opened.inputs[0].quantized))

    stream = client.forward(opened.session_id)
    assert next(stream.answers).attached.weights_version == 0
    stream.send(*batch(1, 0, codes, opened.inputs[0].quantized, every))
    before, done = stream.tensors()
    assert (done.batch_id, done.weights_version) == (1, 0)
    for layer, expected in by_reference(program, codes).items():
        np.testing.assert_array_equal(before[layer], expected)

    features = dequantize(before[every[-2]], opened.layers[-2].output).reshape(6, -1)
    logits = dequantize(before[every[-1]], opened.layers[-1].output).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gradient = (probabilities - np.eye(5)[np.arange(6) % 5]).T @ features / 6
    trained = (head - 0.5 * gradient).astype(np.float32)

    stream.send(
        *weights(7, {"fc": trained}), *batch(2, 7, codes, opened.inputs[0].quantized, every)
    )  # pipelined
    after, done = stream.tensors()
    assert (done.batch_id, done.weights_version) == (2, 7)
    program.load_weights({"fc": trained})
    for layer, expected in by_reference(program, codes).items():
        np.testing.assert_array_equal(after[layer], expected)
    assert not np.array_equal(after[every[-1]], before[every[-1]])
    stream.half_close()
    assert list(stream.answers) == []
    client.release(opened.session_id)


@pytest.fixture
def opened(client: ProtoClient) -> npu_pb2.CompileResponse:
    """A session of the model."""
    return client.compile(good().SerializeToString(), _RANGES)


@pytest.fixture
def codes() -> Codes:
    """A batch of several chunks."""
    return np.random.default_rng(5).integers(-128, 128, (6, 3, 8, 8), dtype=np.int8)


def test_a_batch_between_the_tensors_of_an_update_runs_with_all_of_them(
    client: ProtoClient, opened: npu_pb2.CompileResponse, program: Program, codes: Codes
) -> None:
    """NpuService.Forward: a batch may come there; its layers' tensors may come before weights_loaded."""
    update = list(weights(1, {"fc": np.ones((5, 4), np.float32), "bias": np.ones(4, np.float32)}))
    stream = client.forward(opened.session_id)
    stream.send(
        *update[:2],
        *batch(1, 1, codes, opened.inputs[0].quantized),
        *update[2:],
        *batch(2, 1, codes, opened.inputs[0].quantized),
    )
    next(stream.answers)
    program.load_weights({"fc": np.ones((5, 4), np.float32), "bias": np.ones(4, np.float32)})
    for _ in range(2):
        tensors, done = stream.tensors()
        (last,) = tensors
        assert done.weights_version == 1
        np.testing.assert_array_equal(tensors[last], by_reference(program, codes)[last])
    stream.half_close()


def test_taps_count_in_the_first_chunk_and_once(
    client: ProtoClient, opened: npu_pb2.CompileResponse, codes: Codes
) -> None:
    """BatchChunk.taps: twice is once, unordered is ordered, later ones are ignored."""
    first, *later = batch(1, 0, codes, opened.inputs[0].quantized, [1, 0, 1])
    for message in later:
        message.batch.taps.append(2)
    stream = client.forward(opened.session_id)
    stream.send(first, *later)
    next(stream.answers)
    tensors, _ = stream.tensors()
    assert list(tensors) == [0, 1, len(opened.layers) - 1]
    stream.half_close()


def test_what_is_unfinished_when_the_client_ends_is_dropped(
    client: ProtoClient, opened: npu_pb2.CompileResponse, codes: Codes
) -> None:
    """NpuService.Forward: the answers to what is complete come, then OK; the version stays."""
    stream = client.forward(opened.session_id)
    spec = opened.inputs[0].quantized
    values = {"fc": np.ones((5, 4), np.float32), "bias": np.ones(4, np.float32)}
    unfinished_update = list(weights(4, values))[:-1]
    unfinished_batch = list(batch(2, 4, codes, spec))[:-1]
    stream.send(*batch(1, 0, codes, spec), *unfinished_update, *unfinished_batch)
    stream.half_close()
    next(stream.answers)
    assert stream.tensors()[1].batch_id == 1
    assert list(stream.answers) == []
    again = client.forward(opened.session_id)
    assert next(again.answers).attached.weights_version == 0
    again.half_close()


def test_the_ranges_that_are_required(client: ProtoClient) -> None:
    """CompileHeader.ranges: strangers are ignored, a gap is told, or what it leaves to host and client."""
    required = {name: _RANGES[name] for name in ("x", "b", "c", "y")}
    model = good().SerializeToString()
    opened = client.compile(model, required | {"stranger": (0.0, 1.0)})
    assert {layer.output.name for layer in opened.layers if not layer.moves_data_only} <= required.keys()
    assert not any(layer.host_reason for layer in opened.layers)
    without = {
        gap: client.compile(model, {name: bounds for name, bounds in required.items() if name != gap})
        for gap in ("b", "c")
    }
    reasons = {layer.output.name: layer.host_reason for layer in without["b"].layers}
    assert "'b'" in reasons.pop("c")
    assert not any(reasons.values())
    assert without["c"].outputs == ["b"]
    for name in ("x", "y"):
        with pytest.raises(grpc.RpcError) as caught:
            client.compile(model, {other: bounds for other, bounds in required.items() if other != name})
        assert refusal(caught.value) == ("FAILED_PRECONDITION", "NotCalibrated")
        assert f"'{name}'" in caught.value.details()


def test_a_message_beyond_the_limit(client: ProtoClient) -> None:
    """NpuService: 8 MiB are legal as far as gRPC is concerned, a byte more is not."""
    largest = npu_pb2.CompileRequest(model_chunk=bytes(8 * 2**20 - 5))
    assert largest.ByteSize() == 8 * 2**20
    larger = npu_pb2.CompileRequest(model_chunk=bytes(8 * 2**20 - 4))
    header = npu_pb2.CompileRequest(header=npu_pb2.CompileHeader(model_bytes=8 * 2**20))
    with grpc.insecure_channel(client.target, options=[("grpc.max_send_message_length", -1)]) as channel:
        call = channel.stream_unary(
            "/npu_wire.v1.NpuService/Compile", npu_pb2.CompileRequest.SerializeToString
        )
        for message, expected in (
            (largest, ("INVALID_ARGUMENT", "InvalidInput")),
            (larger, ("RESOURCE_EXHAUSTED", None)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(iter([header, message]))
            assert refusal(caught.value) == expected


def test_the_token_travels_as_a_bearer(start: Start, tmp_path: Path) -> None:
    """NpuService: every call wants it, but health."""
    (tmp_path / "token").write_text("open-sesame")
    device = create_backend("reference", BackendOptions(profile="tflm"))
    server = start(device, listen="127.0.0.1:0", token_file=tmp_path / "token")
    allowed, refused = ProtoClient(server.address, "open-sesame"), ProtoClient(server.address, "open")
    assert allowed.describe().fingerprint.backend == "reference"
    with pytest.raises(grpc.RpcError) as caught:
        refused.describe()
    assert refusal(caught.value) == ("UNAUTHENTICATED", "Unauthenticated")
    with grpc.insecure_channel(server.address) as channel:
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        assert answer == b"\x08\x01"  # SERVING
    allowed.close()
    refused.close()


def refusal(error: grpc.RpcError) -> tuple[str, str | None]:
    """Status and npu-error."""
    return error.code().name, dict(error.trailing_metadata() or ()).get("npu-error")


def error_table() -> dict[str, str]:
    """The table of errors in the comment of the service: class -> status."""
    text = (_PROTO / "npu.proto").read_text()
    return dict(re.findall(r"^//   (\w+) +([A-Z_]+)\b", text, re.MULTILINE))


def test_the_table_of_errors_is_that_of_the_code() -> None:
    """Every class with its status, in the order of the tree, and none that does not exist."""
    classes = [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.NpuError) and each is not errors.NpuError
    ]
    assert error_table() == {each.__name__: errors.status_of(each("x")) for each in classes}


@pytest.mark.parametrize("path", sorted(_PROTO.glob("*.proto")), ids=lambda path: path.name)
def test_everything_in_the_proto_has_a_comment(path: Path) -> None:
    """Each message, field, value, method and oneof: what buf's COMMENTS rules ask for."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    said = re.compile(r"(message|enum|service|rpc|oneof) \w+|[\w. ]+ = \d+;")
    places = [at for at, line in enumerate(lines) if said.match(line)]
    assert len(places) > 5
    assert [lines[at] for at in places if not lines[at - 1].startswith("//")] == []
