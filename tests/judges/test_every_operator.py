"""A profile says of every operator that it takes whether somebody judges it."""

from collections.abc import Iterator

import numpy as np
import pytest
from onnx import ModelProto

from npu_server.compile.reading.operators import OPERATORS, operators_of
from npu_server.conformance.cases import all_cases
from npu_server.conformance.graphs import Case, range_variants
from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.verdicts import SUBJECTS, verdicts
from npu_wire.errors import UnsupportedModel

from .cases import DRAWS
from .exemptions import CONDITIONS, operator_of
from .layers import JudgedLayer, compile_layers, our_outputs

CASES = [case for group in all_cases().values() for case in group if case.op in OPERATORS]


def test_every_operator_has_a_place() -> None:
    """What the compiler learns must be called something before a profile can take it."""
    assert set(SUBJECTS) == set(OPERATORS)


@pytest.mark.parametrize("profile", list_profiles())
def test_no_operator_is_missing_from_both_lists(profile: str) -> None:
    """A row of the matrix is judged (a claim of `test_claims`), or the profile lists it, or has no judge."""
    rules = load_profile(profile)
    assert set(verdicts(rules)) == set(operators_of(rules))
    if rules.judged_by:
        rows = {row for operator in operators_of(rules) for row in SUBJECTS[operator]}
        assert rows - set(rules.unjudged) <= set(DRAWS)
        named = {entry for entry in rules.unjudged if entry not in CONDITIONS}
        assert named <= rows
    else:
        assert rules.unjudged == ()
        assert set(verdicts(rules).values()) == {"judged by nobody", "moves codes, computes none"}


@pytest.mark.parametrize(
    ("profile", "operator", "verdict"),
    [
        ("tflm", "Sub", "judged by TFLM"),
        ("tflm", "Softmax", "judged by nobody"),
        ("litert-reference", "ReduceSum", "judged by nobody"),
        (
            "onnxruntime",
            "AveragePool",
            "judged by ONNX Runtime, but for average pool: ceil_mode with padding that counts",
        ),
        ("onnxruntime", "MaxPool", "judged by ONNX Runtime"),
        ("onnxruntime", "Sub", "judged by ONNX Runtime, but for sub"),
        ("tflm", "Transpose", "moves codes, computes none"),
        ("acc16", "Conv", "judged by nobody"),
    ],
)
def test_verdict_in_words(profile: str, operator: str, verdict: str) -> None:
    """What the page of a profile prints."""
    assert verdicts(load_profile(profile))[operator] == verdict


def _layers(case: Case) -> Iterator[JudgedLayer]:
    try:
        yield from compile_layers(
            case.model(), dict(range_variants(case))["calibrated"], load_profile("tflm")
        )
    except UnsupportedModel:
        pytest.skip("a model that is to be refused")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.title}")
def test_layers_are_what_their_operators_are_said_to_be(case: Case) -> None:
    """A layer's row is one that its model's operators name; one without a row moves codes only."""
    operators = {node.op_type for node in ModelProto.FromString(case.model()).graph.node}
    named = {row for operator in operators & set(SUBJECTS) for row in SUBJECTS[operator]}
    rng = np.random.default_rng(0)
    for judged in _layers(case):
        row = operator_of(judged)
        assert row in named or not row
        if not row:
            inputs = [rng.integers(-99, 99, (2, *shape)).astype(np.int8) for shape in judged.input_shapes]
            given = {code for x in inputs for code in x.reshape(-1).tolist()}
            assert set(our_outputs(judged, inputs, load_profile("tflm"))[0].reshape(-1).tolist()) <= given
