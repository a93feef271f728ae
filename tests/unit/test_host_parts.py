"""What the NPU cannot run is computed by its host: where it is cut, and what comes out."""

import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor
from own_profile import profile_with

from npu_server.backends.emulator.backend import EmulatorBackend
from npu_server.backends.reference import ReferenceBackend
from npu_server.compile.reading.host_work import multiplications
from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.seam import BackendOptions
from npu_wire.errors import (
    InvalidInput,
    InvalidProfile,
    MissingPackage,
    NonFiniteInput,
    NotCalibrated,
    UnsupportedModel,
)
from npu_wire.host_share import host_share
from npu_wire.layer_map import LayerMap, RawSpec, TensorSpec

RNG = np.random.default_rng(7)
LOWEST = float(np.finfo(np.float32).min)
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def normal(*shape: int) -> NDArray[np.float32]:
    """Weights."""
    return (0.5 * RNG.standard_normal(shape)).astype(np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    """A node that is called as its first output; "-" leaves an input out."""
    names = [name.replace("-", "") for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), outputs.split()[0], **attributes)


class Case:
    """A model, the range of every value of it that a client would know, and a batch for it."""

    def __init__(
        self,
        nodes: list[onnx.NodeProto],
        weights: dict[str, NDArray],
        inputs: dict[str, tuple[int, tuple[object, ...]]],
        output: str,
        known: str,
        rank: int = 1,
        masks: str = "",
    ) -> None:
        self.proto = helper.make_model(
            helper.make_graph(
                nodes,
                "net",
                [
                    helper.make_tensor_value_info(n, kind, ["batch", *dims])
                    for n, (kind, dims) in inputs.items()
                ],
                [
                    helper.make_tensor_value_info(
                        output, INT64 if output == "label" else FLOAT, ["batch", *"abc"[:rank]]
                    )
                ],
                [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
            ),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        self.ranges = {name: (-2.0, 2.0) for name in known.split()}
        self.ranges |= {name: (LOWEST, 0.0) for name in masks.split()}
        self.output = output

    @property
    def data(self) -> bytes:
        return self.proto.SerializeToString()

    def with_weights(self, tensors: dict[str, NDArray]) -> bytes:
        changed = onnx.ModelProto()
        changed.CopyFrom(self.proto)
        for tensor in changed.graph.initializer:
            if tensor.name in tensors:
                tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
        return changed.SerializeToString()


def recurrent(op: str, gates: int, **attributes: object) -> Case:
    """A classifier over a bidirectional recurrent layer, with the transposes of batch_first."""
    return Case(
        [
            node("Transpose", "x", "steps", perm=[1, 0, 2]),
            node(op, "steps w r b", "states", hidden_size=6, direction="bidirectional", **attributes),
            node("Transpose", "states", "moved", perm=[2, 0, 1, 3]),
            node("Reshape", "moved shape", "seen"),
            node("Gemm", "seen fc bias", "y", transB=1),
        ],
        {
            "w": normal(2, gates * 6, 4),
            "r": normal(2, gates * 6, 6),
            "b": normal(2, 2 * gates * 6),
            "shape": np.array([0, -1]),
            "fc": normal(3, 60),
            "bias": normal(3),
        },
        {"x": (FLOAT, (5, 4))},
        "y",
        "x seen y",
    )


CASES = {
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3, linear_before_reset=1),
    "embedding": Case(
        [
            node("Gather", "table ids", "vectors"),
            node("ReduceMean", "vectors axes", "mean", keepdims=0),
            node("Gemm", "mean fc", "y"),
        ],
        {"table": normal(11, 8), "axes": np.array([1]), "fc": normal(8, 3)},
        {"ids": (INT64, (6,))},
        "y",
        "vectors mean y",
    ),
    "masked attention": Case(
        [
            node("MatMul", "x wq", "q"),
            node("MatMul", "x wk", "k"),
            node("Transpose", "k", "kt", perm=[0, 2, 1]),
            node("MatMul", "q kt", "scores"),
            node("Unsqueeze", "mask one", "wide"),
            node("Where", "wide scores lowest", "masked"),
            node("Softmax", "masked", "shares"),
            node("MatMul", "shares x", "y"),
        ],
        {
            "wq": normal(8, 8),
            "wk": normal(8, 8),
            "one": np.array([1]),
            "lowest": np.float32(LOWEST),
        },
        {"x": (FLOAT, (6, 8)), "mask": (BOOL, (6,))},
        "y",
        "x q k kt scores shares y",
        rank=2,
    ),
    "mask that is added": Case(
        [
            node("MatMul", "x wq", "q"),
            node("Transpose", "x", "xt", perm=[0, 2, 1]),
            node("MatMul", "q xt", "scores"),
            node("Unsqueeze", "mask one", "wide"),
            node("Cast", "wide", "real", to=FLOAT),
            node("Sub", "unit real", "hidden"),
            node("Mul", "hidden lowest", "far"),
            node("Add", "scores far", "masked"),
            node("Softmax", "masked", "shares"),
            node("MatMul", "shares x", "y"),
        ],
        {
            "wq": normal(8, 8),
            "one": np.array([1]),
            "unit": np.float32(1),
            "lowest": np.float32(LOWEST),
        },
        {"x": (FLOAT, (6, 8)), "mask": (BOOL, (6,))},
        "y",
        "x q xt scores real hidden shares y",
        rank=2,
        masks="far masked",
    ),
    "step that nobody calibrated": Case(
        [
            node("MatMul", "x w", "q"),
            node("Transpose", "x", "xt", perm=[0, 2, 1]),
            node("MatMul", "q xt", "scores"),
            node("MatMul", "x xt", "step"),
            node("Add", "scores step", "sum"),
            node("MatMul", "sum x", "y"),
        ],
        {"w": normal(8, 8)},
        {"x": (FLOAT, (6, 8))},
        "y",
        "x q xt scores sum y",
        rank=2,
    ),
    "rows that a mask of the batch picks": Case(
        [
            node("Shape", "x", "n", start=0, end=1),
            node("ConstantOfShape", "n", "zeros"),
            node("Equal", "zeros zero", "all"),
            node("NonZero", "all", "at"),
            node("Transpose", "at", "rows", perm=[1, 0]),
            node("GatherND", "x rows", "chosen"),
            node("Gemm", "chosen w", "y"),
        ],
        {"zero": np.float32(0), "w": normal(8, 3)},
        {"x": (FLOAT, (8,))},
        "y",
        "x chosen y",
    ),
    "split by one number": Case(
        [
            node("CumSum", "x one", "c"),
            node("SplitToSequence", "c four", "halves", axis=1),
            node("SequenceAt", "halves one", "second"),
            node("Gemm", "second w", "y"),
        ],
        {"one": np.array(1), "four": np.array(4), "w": normal(4, 3)},
        {"x": (FLOAT, (8,))},
        "y",
        "x second y",
    ),
    "norm over channels": Case(
        [
            node("Conv", "x w", "a", pads=[1, 1, 1, 1]),
            node("LpNormalization", "a", "n", axis=1, p=2),
            node("Conv", "n v", "y"),
        ],
        {"w": normal(4, 3, 3, 3), "v": normal(5, 4, 1, 1)},
        {"x": (FLOAT, (3, 5, 5))},
        "y",
        "x a n y",
        rank=3,
    ),
    "running sum and largest": Case(
        [
            node("Gemm", "x w", "a"),
            node("CumSum", "a one", "c"),
            node("TopK", "c three", "largest where"),
            node("Gemm", "largest v", "y"),
        ],
        {"w": normal(8, 7), "one": np.array(1), "three": np.array([3]), "v": normal(3, 2)},
        {"x": (FLOAT, (8,))},
        "y",
        "x a largest y",
    ),
}


def batch_for(layer_map: LayerMap, samples: int = 3) -> dict[str, NDArray]:
    """Codes for quantized inputs, small numbers for raw ones."""
    rng = np.random.default_rng(samples)
    batch: dict[str, NDArray] = {}
    for spec in layer_map.inputs:
        shape = (samples, *spec.shape)
        high = 2 if isinstance(spec, RawSpec) and spec.dtype == np.bool_ else 11
        if isinstance(spec, TensorSpec):
            batch[spec.name] = rng.integers(-128, 128, shape).astype(np.int8)
        else:
            batch[spec.name] = rng.integers(0, high, shape).astype(spec.dtype)
            batch[spec.name].reshape(samples, -1)[:, 0] = 1
    return batch


def run(backend_class: type, case: Case, model: bytes | None = None, profile: str = "tflm"):
    """A program, its batch, and every tensor that it yields."""
    backend = backend_class(BackendOptions(profile=profile))
    backend.open()
    program = backend.compile(model or case.data, case.ranges)
    batch = batch_for(program.layer_map)
    return program, batch, tensors_of(program, batch)


def tensors_of(program, batch) -> dict[str, NDArray]:
    """What each layer yields, by name."""
    layers = program.layer_map.layers
    yielded = program.forward(batch, range(len(layers)))
    return {layers[tensor.layer].name: tensor.data for tensor in yielded if tensor is not None}


@pytest.mark.parametrize("name", CASES)
def test_host_part_is_the_float_subgraph_between_dequantize_and_quantize(name: str) -> None:
    """ONNX's reference evaluator gets each host part's dequantized inputs and yields its codes."""
    case = CASES[name]
    program, batch, tensors = run(ReferenceBackend, case)
    parts = [layer for layer in program.layer_map.layers if layer.host_float]
    assert parts
    for layer in parts:
        assert layer.host_float
        feeds = {}
        for source in layer.inputs:
            spec = program.layer_map.tensors.get(source)
            codes = {**batch, **tensors}[source]
            feeds[source] = codes
            if spec is not None:
                feeds[source] = ((codes.astype(np.float32) - spec.zero_point) * spec.scale).astype(np.float32)
        part = Extractor(onnx.shape_inference.infer_shapes(case.proto)).extract_model(
            list(layer.inputs), [layer.name]
        )
        (real,) = ReferenceEvaluator(part).run(None, feeds)
        steps = np.asarray(real, np.float64) / layer.output.scale + layer.output.zero_point
        expected = np.clip(np.rint(steps), -128, 127)
        difference = np.abs(tensors[layer.name] - expected)
        # Another order of float32 sums may take what lies at half a step to the other side.
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02
        assert len(np.unique(expected)) > 5


@pytest.mark.parametrize("name", CASES)
def test_both_backends_share_the_host(name: str) -> None:
    """The emulator yields the reference's bits of every layer, host parts included."""
    _, batch, expected = run(ReferenceBackend, CASES[name])
    _, same, tensors = run(EmulatorBackend, CASES[name])
    assert all(np.array_equal(batch[key], same[key]) for key in batch)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[key], key)


@pytest.mark.parametrize("backend", [ReferenceBackend, EmulatorBackend])
def test_host_weights_are_updated_like_all_others(backend: type) -> None:
    """After an update the program yields what one yields that was compiled with the new weights."""
    case = CASES["LSTM"]
    program, batch, before = run(backend, case)
    assert program.parameters.keys() >= {"w", "r", "b", "fc", "bias"}
    fresh = {name: normal(*program.parameters[name]) for name in ("r", "fc")}
    program.load_weights(fresh)
    _, _, expected = run(backend, case, case.with_weights(fresh))
    after = tensors_of(program, batch)
    assert not np.array_equal(after["seen"], before["seen"])
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, expected[name], name)
    with pytest.raises(NonFiniteInput):
        program.load_weights({"w": np.full(program.parameters["w"], np.nan, np.float32)})
    np.testing.assert_array_equal(tensors_of(program, batch)["seen"], after["seen"])


def test_attention_leaves_only_mask_and_softmax_to_the_host() -> None:
    """The products stay on the NPU; what has minus infinity in it never becomes INT8."""
    layer_map = run(ReferenceBackend, CASES["masked attention"])[0].layer_map
    parts = [layer for layer in layer_map.layers if layer.host_float]
    assert [(layer.name, set(layer.inputs)) for layer in parts] == [("shares", {"scores", "mask"})]
    assert [layer.op for layer in layer_map.layers].count("MatMul") == 2
    assert layer_map.inputs[1] == RawSpec("mask", (6,), np.dtype(np.bool_), True)


def test_a_mask_that_is_added_is_made_from_what_the_user_gave() -> None:
    """Nothing of it passes through INT8, where one step off 0 is minus infinity."""
    layer_map = run(ReferenceBackend, CASES["mask that is added"])[0].layer_map
    parts = [(layer.name, set(layer.inputs)) for layer in layer_map.layers if layer.host_float]
    assert parts == [("shares", {"scores", "mask"})]
    assert [layer.name for layer in layer_map.layers if not layer.host_float] == ["q", "xt", "scores", "y"]


def test_a_value_without_range_stays_an_error_where_nothing_with_one_follows() -> None:
    """What the caller forgot to calibrate is told, and not computed by somebody else."""
    case = CASES["step that nobody calibrated"]
    for missing in ("x", "y"):
        ranges = {name: both for name, both in case.ranges.items() if name != missing}
        with pytest.raises(NotCalibrated, match=f"'{missing}'"):
            ReferenceBackend(BackendOptions(profile="tflm")).compile(case.data, ranges)


def test_share_of_the_host_is_counted_from_the_layer_map() -> None:
    """Counted by hand: an LSTM of 2 times 6 units over 5 steps of 4 numbers, and 60 times 3 weights."""
    share = host_share(run(ReferenceBackend, CASES["LSTM"])[0].layer_map)
    lstm = 5 * 2 * 4 * 6 * (4 + 6)
    (layer,) = share.layers
    assert (layer.name, layer.macs, share.of_layers) == ("seen", lstm, 2)
    assert (share.macs, share.of_macs) == (lstm, lstm + 60 * 3)
    assert share.bytes_across == 5 * 4 + 60  # x to the host, its result back
    first, second = str(share).splitlines()
    assert first == (
        "1 of 2 layers, 93.0% of multiply-accumulates and 80 bytes a sample across are "
        "host float: bits are the runtime's, not the chip's"
    )
    assert second == "  1 LSTM: node 'states' (LSTM): the NPU has no such operator"
    raw = host_share(run(ReferenceBackend, CASES["embedding"])[0].layer_map)
    assert raw.bytes_across == 6 * 8 + 6 * 8  # token ids of 8 bytes, vectors of 8 codes


def test_tail_is_left_to_the_client() -> None:
    """What follows the last layers and is nothing that the NPU does is not in the program."""
    case = Case(
        [node("Gemm", "x w", "logits"), node("ArgMax", "logits", "label", axis=1)],
        {"w": normal(4, 3)},
        {"x": (FLOAT, (4,))},
        "label",
        "x logits",
        rank=0,
    )
    layer_map = run(ReferenceBackend, case)[0].layer_map
    assert layer_map.outputs == ("logits",)
    assert [layer.name for layer in layer_map.layers] == ["logits"]


def test_token_that_does_not_exist_is_the_callers_error() -> None:
    """ONNX Runtime's message arrives, and the program goes on."""
    program, batch, tensors = run(ReferenceBackend, CASES["embedding"])
    wrong = {"ids": np.full_like(batch["ids"], 99)}
    with pytest.raises(InvalidInput, match=r"host part 'vectors' .*out of data bounds"):
        tensors_of(program, wrong)
    np.testing.assert_array_equal(tensors_of(program, batch)["y"], tensors["y"])


def test_what_onnxruntime_has_no_kernel_for_is_refused_when_it_is_compiled() -> None:
    """The refusal names node, operator and reason."""
    case = Case(
        [
            node("Cast", "x", "short", to=TensorProto.BFLOAT16),
            node("Exp", "short", "power"),
            node("Cast", "power", "real", to=FLOAT),
            node("Gemm", "real w", "y"),
        ],
        {"w": normal(4, 3)},
        {"x": (FLOAT, (4,))},
        "y",
        "x real y",
    )
    with pytest.raises(UnsupportedModel, match=r"host part 'real' \(short, power, real\): .*Exp"):
        run(ReferenceBackend, case)


def test_without_onnxruntime_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lacks the package says what to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedModel, match=re.escape("pip install 'npu-in-the-loop[server]'")):
        run(ReferenceBackend, CASES["LSTM"])


def test_onnxruntime_is_loaded_only_where_a_model_needs_it() -> None:
    """A compiler that has been imported has not imported it: it takes memory and time from every server."""
    script = "import sys, npu_server.execution.program; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_constant_that_onnxruntime_computes_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler folds with it what the reference evaluator does not."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    case = Case(
        [node("GatherElements", "w places", "picked"), node("Gemm", "x picked", "y")],
        {"w": normal(4, 3), "places": np.zeros((4, 3), np.int64)},
        {"x": (FLOAT, (4,))},
        "y",
        "x y",
    )
    with pytest.raises(MissingPackage, match=re.escape("pip install 'npu-in-the-loop[server]'")):
        run(ReferenceBackend, case)


@pytest.mark.parametrize("line", ['unsupported = "refuse"', "", 'unsupported = ["GRU"]'])
def test_a_profile_may_refuse(tmp_path, line: str) -> None:
    """Without the host the operator is refused as ever, by node, operator and reason."""
    with pytest.raises(
        UnsupportedModel, match=r"node 'states' \(LSTM\): the NPU has no such operator\. .*let .* host run it"
    ):
        run(ReferenceBackend, CASES["LSTM"], profile=profile_with(tmp_path, line))


def test_a_profile_may_name_operators(tmp_path) -> None:
    """The operators that it names go to the host, with what moves their results."""
    layer_map = run(
        ReferenceBackend, CASES["LSTM"], profile=profile_with(tmp_path, 'unsupported = ["LSTM"]')
    )[0].layer_map
    assert [layer.op for layer in layer_map.layers] == ["LSTM", "Gemm"]


@pytest.mark.parametrize("value", ['"maybe"', "true", '["NoSuchOperator"]', "[1]"])
def test_bad_value_is_a_profile_error(tmp_path, value: str) -> None:
    """File, key and legal values are named."""
    with pytest.raises(InvalidProfile, match=r"own\.toml: unsupported = .*legal: \"host\", \"refuse\""):
        load_profile(profile_with(tmp_path, f"unsupported = {value}"))


def test_shipped_profiles_use_the_host() -> None:
    """Every NPU that ships has a host."""
    assert all(load_profile(name).takes_on_host("LSTM") for name in list_profiles())


@pytest.mark.parametrize("backend", [ReferenceBackend, EmulatorBackend])
def test_parts_that_are_joined_along_the_batch_keep_their_samples_apart(backend: type) -> None:
    """Two branches computed as one batch of twice the size, ONNX Runtime's values: samples are innermost."""
    case = Case(
        [
            node("MatMul", "x w", "a"),
            node("MatMul", "x v", "b"),
            node("Concat", "a b", "both", axis=0),
            node("MatMul", "both u", "c"),
            node("Shape", "x", "n", start=0, end=1),
            node("Squeeze", "n", "samples"),
            node("SplitToSequence", "c samples", "parts", axis=0),
            node("SequenceAt", "parts zero", "first"),
            node("SequenceAt", "parts one", "second"),
            node("Sub", "first second", "y"),
        ],
        {
            **{name: 0.4 * normal(4, 4) for name in "wvu"},
            "zero": np.array(0),
            "one": np.array(1),
        },
        {"x": (FLOAT, (3, 4))},
        "y",
        "x a b both c first second y",
        rank=2,
    )
    program, batch, tensors = run(backend, case)
    assert "both" in {layer.name for layer in program.layer_map.layers if layer.host_float}
    x, y = program.layer_map.tensors["x"], program.layer_map.tensors["y"]
    given = ((batch["x"].astype(np.float32) - x.zero_point) * x.scale).astype(np.float32)
    session = onnxruntime.InferenceSession(case.data, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": given})
    got = (tensors["y"].astype(np.float32) - y.zero_point) * y.scale
    assert np.abs(got - np.clip(expected, -2, 2)).max() < 0.1


@pytest.mark.parametrize(
    "mixes",
    [
        [node("CumSum", "x first", "h")],
        [node("ReduceMean", "x first_axis", "m", keepdims=1), node("Sub", "x m", "h")],
        [node("ReduceMax", "x", "m", keepdims=1), node("Sub", "x m", "h")],
    ],
    ids=["sum along the batch", "less the batch's mean", "less the largest of all"],
)
@pytest.mark.parametrize("backend", [ReferenceBackend, EmulatorBackend])
def test_what_mixes_the_samples_of_a_batch_is_refused(backend: type, mixes: list[onnx.NodeProto]) -> None:
    """A batch that is computed in parts would have other numbers, and nobody would know."""
    case = Case(
        [*mixes, node("Flatten", "h", "flat"), node("Gemm", "flat w", "y")],
        {"first": np.array(0), "first_axis": np.array([0]), "w": normal(20, 3)},
        {"x": (FLOAT, (5, 4))},
        "y",
        "x m h flat y",
    )
    with pytest.raises(UnsupportedModel, match="depends on the others of its batch"):
        run(backend, case)


@pytest.mark.parametrize(
    ("equation", "shapes", "expected"),
    [
        ("bqd,bkd->bqk", [(1, 3, 8), (1, 5, 8)], 3 * 5 * 8),
        ("bijk,bkjl", [(1, 2, 4, 5), (1, 5, 4, 3)], 2 * 3 * 5 * 4),
        ("...i,oi->...o", [(1, 7, 4), (6, 4)], 7 * 6 * 4),
    ],
)
def test_multiplications_of_an_einsum(equation: str, shapes: list, expected: int) -> None:
    """Counted by hand: the numbers of the result times those that each is summed over."""
    y = np.einsum(equation, *(np.zeros(shape) for shape in shapes))
    known = {"a": shapes[0], "b": shapes[1], "y": y.shape}
    assert multiplications(node("Einsum", "a b", "y", equation=equation), known.__getitem__) == expected
