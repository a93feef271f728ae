"""The list of mutants fits the code, its page fits the list, and the run tells caught from unnoticed."""

from collections import Counter
from pathlib import Path

import pytest

from .mutants import ROOT, Mutant, load
from .report import complaint
from .run import Verdict, copy_tree, examine

HAND = "tests/unit/test_ties_by_hand.py"
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


@pytest.mark.slow
def test_values_by_hand_catch_a_mutant_and_pass_what_is_right(tmp_path: Path) -> None:
    """A truncated mantissa fails its own test by a wrong value, in a copy; a harmless change fails none."""
    copy_tree(tmp_path)
    named = {mutant.id: mutant for mutant in load() if mutant.named}
    before = (ROOT / HARMLESS.file).read_bytes()
    caught = examine(named["mantissa-truncated"], tmp_path, [HAND])
    assert (caught.outcome, caught.error) == ("killed", "AssertionError")
    assert caught.test == f"{HAND}::test_mantissa_is_rounded[ReferenceBackend]"
    assert examine(HARMLESS, tmp_path, [HAND]).outcome == "survived"
    assert (ROOT / HARMLESS.file).read_bytes() == before
