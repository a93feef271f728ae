"""Every profile that is named after an engine computes what that engine computes, element by element."""

import pytest

from npu_server.numerics.profile import list_profiles, load_profile
from npu_server.verdicts import SUBJECTS

from . import engines
from .cases import DRAWS
from .claims import Extent, judge_claim
from .exemptions import CONDITIONS
from .networks import NETWORKS

CLAIMS = [(name, judge) for name in list_profiles() for judge in load_profile(name).judged_by]


@pytest.mark.parametrize("subject", [*DRAWS, *NETWORKS])
@pytest.mark.parametrize(("profile", "judge"), CLAIMS)
def test_claim_holds(profile: str, judge: str, subject: str) -> None:
    """The engine agrees on every output of random layers, and of whole networks layer by layer.

    `make conformance` compares many more.
    """
    if subject in load_profile(profile).unjudged:
        pytest.skip(f"{profile} claims nothing about {subject}")
    try:
        engines.find(judge)
    except ImportError as error:
        pytest.skip(f"{judge} is not installed ({error}); make conformance installs it")
    row = judge_claim(profile, judge, subject, Extent(elements=8_000, scales=256, triples=4))
    assert row.cell.elements >= 2_000, row.verdict
    assert row.cell.mismatches == 0, row.verdict


@pytest.mark.parametrize(("profile", "judge"), CLAIMS)
def test_claims_name_what_exists(profile: str, judge: str) -> None:
    """Judges and operators in a profile are those of the harness; a misspelled exemption exempts nothing."""
    assert judge in engines.NAMES
    named = {row for rows in SUBJECTS.values() for row in rows}
    assert set(load_profile(profile).unjudged) <= named | set(CONDITIONS)
