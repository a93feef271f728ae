"""Whatever bytes come, the compiler answers with a program or a clear error, in bounded memory and time."""

from collections.abc import Iterator

import onnx
import pytest
from hostile_models import RANGES, good, hostile_models, ranges_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited_compiler import Answer, LimitedCompiler
from onnx import ModelProto, helper

from npu_server.conformance.cases import all_cases

SOUND = good().SerializeToString()
BASES = [SOUND, *(case.model() for cases in all_cases().values() for case in cases)]
PROPERTY = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def compiler() -> Iterator[LimitedCompiler]:
    """A compiler that may take 2 GiB and a minute."""
    with LimitedCompiler() as limited:
        yield limited


def assert_clear(answer: Answer, what: str) -> None:
    """Compiled, or refused in words."""
    assert answer.kind != "defect", f"{what}: {answer.detail}"
    assert answer.kind == "compiled" or answer.detail.strip(), what


def test_hostile_models_are_answered_clearly(compiler: LimitedCompiler) -> None:
    """Every one of the list: no crash, no hang, no more memory than allowed."""
    for title, model in hostile_models():
        assert_clear(compiler.compile(model, ranges_for(model)), title)
    assert compiler.compile(SOUND, RANGES) == Answer("compiled", "")


@pytest.mark.parametrize(
    ("title", "kind", "words"),
    [
        ("external data", "InvalidModel", "stored outside the model"),
        ("external data in a branch", "InvalidModel", "stored outside the model"),
        ("external data in a list", "InvalidModel", "stored outside the model"),
        ("many large constants", "UnsupportedModel", "constant of 67108864 elements"),
        ("a long chain of large constants", "UnsupportedModel", "constant of 67108864 elements"),
        ("one large weight for many layers", "UnsupportedModel", "16777216 weights"),
        ("weight complex64", "InvalidModel", "holds complex64"),
        ("hard sigmoid nan", "UnsupportedModel", "alpha is nan; it must be finite"),
        ("conv weight (4, 3, 0, 0)", "UnsupportedModel", "0 weights"),
        ("bias of 3", "UnsupportedModel", "bias of shape (3,) for 4 output channels"),
        ("too many nodes", "UnsupportedModel", "20000 at most"),
        ("cycle", "InvalidModel", "checker"),
        ("a name that is no UTF-8", "InvalidModel", "names are UTF-8 text"),
        ("value with a long name", "InvalidModel", "is 3145728 long"),
        ("sparse initializer", "InvalidModel", "store them dense"),
        ("25 branches in one another", "UnsupportedModel", "no such operator"),
        ("a function that calls itself", "UnsupportedModel", "local functions"),
    ],
)
def test_refusals_say_what_is_wrong(compiler: LimitedCompiler, title: str, kind: str, words: str) -> None:
    """Class and words of those that once did harm, and of those that could."""
    model = next(data for name, data in hostile_models() if name == title)
    answer = compiler.compile(model, ranges_for(model))
    assert answer.kind == kind
    assert words in answer.detail


@settings(PROPERTY, max_examples=250)
@given(data=st.data())
def test_damaged_bytes(compiler: LimitedCompiler, data: st.DataObject) -> None:
    """Bits flipped, bytes cut out, put in, doubled, at any place."""
    sound = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(sound) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "end"]))
        if kind == "flip":
            sound[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del sound[place : place + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            sound[place:place] = data.draw(st.binary(min_size=1, max_size=12))
        elif kind == "repeat":
            sound[place:place] = sound[place : place + data.draw(st.integers(1, 200))]
        else:
            del sound[place:]
        if not sound:
            break
    assert_clear(compiler.compile(bytes(sound), RANGES), repr(bytes(sound)))


NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 255, 2**16, 2**31, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63)]
)
NAMES = st.sampled_from(["x", "y", "a", "b", "c", "d", "w", "bias", "fc", "", "nobody"])
REALS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, float("nan"), float("inf"), -float("inf")])
OPERATORS = st.sampled_from(sorted({schema.name for schema in onnx.defs.get_all_schemas()}))


@settings(PROPERTY, max_examples=350)
@given(data=st.data())
def test_models_that_are_wrong_in_meaning(compiler: LimitedCompiler, data: st.DataObject) -> None:
    """Well-formed messages whose operators, wires, attributes, shapes and numbers are anything."""
    model = ModelProto.FromString(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 4))):
        _spoil(model, data)
    sound = model.SerializeToString()
    assert_clear(compiler.compile(sound, ranges_for(sound)), repr(sound))


def _spoil(model: ModelProto, data: st.DataObject) -> None:
    graph = model.graph
    node = data.draw(st.sampled_from(list(graph.node)))
    tensor = data.draw(st.sampled_from(list(graph.initializer) or [onnx.TensorProto(dims=[1])]))
    kind = data.draw(st.sampled_from([
        "operator", "input", "output", "more inputs", "attribute", "real attribute", "dims", "type", "number",
        "input shape", "node twice", "order", "name", "new node",
    ]))  # fmt: skip
    if kind == "operator":
        node.op_type = data.draw(OPERATORS)
    elif kind == "input" and node.input:
        node.input[data.draw(st.integers(0, len(node.input) - 1))] = data.draw(NAMES)
    elif kind == "output":
        node.output[0] = data.draw(NAMES)
    elif kind == "more inputs":
        node.input.append(data.draw(NAMES))
    elif kind == "attribute":
        names = [
            "strides",
            "pads",
            "dilations",
            "kernel_shape",
            "group",
            "axis",
            "perm",
            "to",
            "blocksize",
            "keepdims",
        ]
        value = data.draw(st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5)))
        _set(node, data.draw(st.sampled_from(names)), value)
    elif kind == "real attribute":
        _set(node, data.draw(st.sampled_from(["alpha", "beta", "epsilon", "gamma"])), data.draw(REALS))
    elif kind == "dims" and tensor.dims:
        tensor.dims[data.draw(st.integers(0, len(tensor.dims) - 1))] = data.draw(NUMBERS)
    elif kind == "type":
        tensor.data_type = data.draw(st.integers(0, 30))
    elif kind == "number":
        values = onnx.numpy_helper.to_array(tensor).copy() if _readable(tensor) else None
        if values is not None and values.size and values.dtype.kind == "f":
            values.flat[0] = data.draw(REALS)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    elif kind == "input shape":
        dims = graph.input[0].type.tensor_type.shape.dim
        dims[data.draw(st.integers(0, len(dims) - 1))].dim_value = data.draw(NUMBERS)
    elif kind == "node twice":
        graph.node.add().CopyFrom(node)
    elif kind == "order":
        nodes = data.draw(st.permutations(list(graph.node)))
        del graph.node[:]
        graph.node.extend(nodes)
    elif kind == "name":
        tensor.name = data.draw(NAMES)
    else:
        made = helper.make_node(
            data.draw(OPERATORS), data.draw(st.lists(NAMES, max_size=4)), [data.draw(NAMES)], "new"
        )
        graph.node.insert(data.draw(st.integers(0, len(graph.node))), made)


def _readable(tensor: onnx.TensorProto) -> bool:
    try:
        onnx.numpy_helper.to_array(tensor)
    except Exception:
        return False
    return True


def _set(node: onnx.NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


@settings(PROPERTY, max_examples=60)
@given(
    ranges=st.dictionaries(
        st.sampled_from(["x", "a", "b", "c", "d", "y"]),
        st.tuples(st.floats(width=32), st.floats(width=32)),
    )
)
def test_any_ranges(compiler: LimitedCompiler, ranges: dict[str, tuple[float, float]]) -> None:
    """NaN, infinite, reversed, vast and tiny ranges."""
    assert_clear(compiler.compile(SOUND, {**RANGES, **ranges}), repr(ranges))


@pytest.mark.slow
@settings(PROPERTY, max_examples=8000)
@given(data=st.data())
def test_many_models_that_are_wrong_in_meaning(compiler: LimitedCompiler, data: st.DataObject) -> None:
    """The same, for longer."""
    model = ModelProto.FromString(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 6))):
        _spoil(model, data)
    sound = model.SerializeToString()
    assert_clear(compiler.compile(sound, ranges_for(sound)), repr(sound))
