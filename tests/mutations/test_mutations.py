"""The list of mutants fits the code, its page fits the list, and the run tells caught from unnoticed."""

from collections import Counter
from pathlib import Path

import pytest

from .mutants import ROOT, Mutant, load
from .report import complaint
from .run import Verdict, copy_tree, examine

HAND = "tests/unit/test_ties_by_hand.py"
QUICK = (HAND, "tests/unit/test_folding_by_hand.py", "tests/judges/test_pinned.py")
HARMLESS = Mutant(
    "harmless",
    "npu_server/numerics/requantize.py",
    "np.clip(total, -limit, limit - 1)",
    "np.clip(total, -limit, -1 + limit)",
    "nothing",
)


def test_every_mutant_fits_the_code() -> None:
    """Its old text occurs once, its new text parses and says something else; no id is taken twice."""
    mutants = load()
    for mutant in mutants:
        mutant.apply((ROOT / mutant.file).read_text("utf-8"))
    assert [name for name, count in Counter(mutant.id for mutant in mutants).items() if count > 1] == []
    assert sum(mutant.named for mutant in mutants) == 8
    rooms = Counter(mutant.file.split("/")[1] for mutant in mutants)
    assert min(rooms[room] for room in ("numerics", "compile", "backends")) >= 20


def test_page_is_that_of_the_list() -> None:
    """Every mutant has its line, every survivor its reason; `make mutations` writes the page anew."""
    page = (ROOT / "docs" / "mutations.md").read_text("utf-8")
    missing = [mutant.id for mutant in load() if f"`{mutant.file}`" not in page or mutant.id not in page]
    assert missing == [], "run make mutations"
    assert [mutant.id for mutant in load() if mutant.survives not in page] == [], "run make mutations"


@pytest.mark.parametrize(
    ("verdict", "named", "survives", "stands"),
    [
        (Verdict("killed", HAND, "AssertionError"), True, "", True),
        (Verdict("killed", HAND, "KeyError"), True, "", False),
        (Verdict("killed", HAND, "KeyError"), False, "", True),
        (Verdict("killed", HAND, "AssertionError"), False, "equal for every input", False),
        (Verdict("survived"), False, "equal for every input", True),
        (Verdict("survived"), False, "", False),
        (Verdict("survived"), True, "equal for every input", False),
        (Verdict("timeout"), True, "", False),
        (Verdict("broken"), False, "", False),
    ],
)
def test_what_a_verdict_means(verdict: Verdict, named: bool, survives: str, stands: bool) -> None:
    """A survivor needs a reason, a named mutant a wrong value, and one that cannot run proves nothing."""
    mutant = Mutant("m", "f", "a", "b", "it", named=named, survives=survives)
    assert (complaint(mutant, verdict) == "") == stands


def test_text_that_moved_on_is_told() -> None:
    """A mutant whose line is gone, or there twice, or that changes a comment only, is no mutant."""
    for text in ("x = 2\n", "x = 1\nx = 1\n"):
        with pytest.raises(ValueError, match="not once"):
            Mutant("m", "f.py", "x = 1", "x = 3", "it").apply(text)
    with pytest.raises(ValueError, match="stays what it was"):
        Mutant("m", "f.py", "1", "1  # one", "it").apply("x = 1\n")
    assert Mutant("m", "f.py", "x = 1", "x = 3", "it").apply("x = 1\n") == "x = 3\n"


HANDFUL = {
    "mantissa-truncated": "test_ties_by_hand.py::test_mantissa_is_rounded",
    "bias-truncated": "test_ties_by_hand.py::test_bias_is_rounded_to_even",
    "batch-norm-without-epsilon": "test_folding_by_hand.py::test_batch_norm_is_folded",
    "hard-swish-without-nudge": "test_pinned.py::test_every_code_at_pinned_scales",
}
"""Mutant -> the test that must be the first to fail."""


@pytest.mark.slow
def test_a_handful_is_caught_and_what_is_right_passes(tmp_path: Path) -> None:
    """Each fails a test by a wrong value, in a copy of the tree; a change that changes nothing fails none."""
    copy_tree(tmp_path)
    before = (ROOT / HARMLESS.file).read_bytes()
    for mutant in load():
        if mutant.id in HANDFUL:
            caught = examine(mutant, tmp_path, QUICK)
            assert (caught.outcome, caught.error) == ("killed", "AssertionError"), mutant.id
            assert HANDFUL[mutant.id] in caught.test
    assert examine(HARMLESS, tmp_path, QUICK).outcome == "survived"
    assert (ROOT / HARMLESS.file).read_bytes() == before
