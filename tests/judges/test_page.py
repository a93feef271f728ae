"""The conformance matrix says what was done, and is that of this code."""

import itertools
from pathlib import Path

import pytest

from npu_server.numerics.profile import load_profile

from . import engines, provenance
from .cases import cases
from .cell import Cell
from .claims import Row
from .layers import Unjudged
from .report import COMPOSED_IN_TOSA, DIGEST, markdown

PAGE = Path(__file__).parents[2] / "docs" / "conformance-matrix.md"


def test_page_is_that_of_this_code() -> None:
    """A rule, a backend or a judge that changed since makes the page's numbers those of other code."""
    assert f"{DIGEST}{provenance.digest()}" in PAGE.read_text("utf-8"), (
        "docs/conformance-matrix.md is of other code; run make conformance"
    )


def test_digest_follows_code_not_words(tmp_path: Path) -> None:
    """Comments, docstrings and layout decide about nothing; a number, a name or a default does."""
    same = [
        'def f(x=1):\n    """Words."""\n    return x + 2\n',
        '"""More words."""\n\n\ndef f(x=1):  # a comment\n    return (\n        x\n        + 2\n    )\n',
    ]
    other = [
        "def f(x=1):\n    return x + 3\n",
        "def f(x=2):\n    return x + 2\n",
        "def f(x=1):\n    return x - 2\n",
    ]
    found = []
    for index, text in enumerate([*same, *other]):
        path = tmp_path / f"{index}.py"
        path.write_text(text)
        found.append(provenance.essence(path))
    assert found[0] == found[1]
    assert len(set(found)) == 4
    for index, text in enumerate(['a = 1  # one\nb = "x"\n', 'b = "x"\n\na = 1\n', 'a = 2\nb = "x"\n']):
        tmp_path.joinpath(f"{index}.toml").write_text(text)
    one, two, three = (provenance.essence(tmp_path / f"{index}.toml") for index in range(3))
    assert one == two != three


def test_entries_say_what_was_tried() -> None:
    """Sampled or exhaustive, in how many configurations, how many were refused and why, what is composed."""
    rows = [
        Row("tflm", "TFLM", "mean", Cell("mean", 9_000, 0, 0, 4), claimed=True),
        Row("tflm", "TFLM", "relu", Cell("relu", 512, 0, 0, 2, 2, {"too wide": 3}), claimed=True),
        Row("tosa-single", "TOSA single rounding", "mean", Cell("mean", 70, 1, 1, 1), claimed=True),
        Row("tosa-single", "TOSA single rounding", "relu", Cell("relu", 600, 0, 0, 3, 2), claimed=False),
    ]
    lines = markdown(rows).splitlines()
    single = "**1** of 70 sampled, composed<br>1 configuration"
    assert f"| mean | 0 of 9,000 sampled<br>4 configurations | {single} |" in lines
    assert "| relu | 0 of 512 exhaustive<br>2 configurations, 3 refused | not claimed |" in lines
    assert "- TFLM: too wide (3)" in lines
    assert f"- `tosa-single`: {'; '.join(load_profile('tosa-single').unjudged)}" in lines
    assert "**9,582 outputs compared in 7 configurations, 1 mismatches.**" in lines
    assert any(line.startswith("- Engines: onnxruntime ") for line in lines)


@pytest.mark.parametrize("subject", COMPOSED_IN_TOSA)
def test_composed_operators_are_those_of_the_graph(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page calls composed is what the harness gives to TOSA."""
    judge = pytest.importorskip("judges.tosa", exc_type=ImportError)
    added: list[str] = []
    original = judge._Author.operator

    def record(author, op, *args, **fields):
        added.append(op)
        return original(author, op, *args, **fields)

    monkeypatch.setattr(judge._Author, "operator", record)
    engine = engines.find("TOSA single rounding")
    for case in cases(subject, 0):
        judged = case.compile(load_profile("tosa-single"))
        added.clear()
        try:
            engine.run(judged, case.inputs(judged))
        except Unjudged:
            continue
        if subject == "relu":
            added.append("CLAMP")  # every graph ends with it; here it is the operator
        if added:
            break
    assert tuple(op for op, _ in itertools.groupby(added)) == COMPOSED_IN_TOSA[subject]
