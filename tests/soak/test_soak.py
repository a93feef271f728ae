"""The soak, short."""

import pytest

from tests.soak.campaign import soak


@pytest.mark.slow
def test_either_side_may_be_killed_at_any_time() -> None:
    """Right bits throughout, through shared memory; nothing is left of a trainer that was killed."""
    outcome = soak(batches=250, kill_every=50, seed=3, say=lambda line: None)
    assert outcome.faults == []
    assert outcome.batches == 250
    assert outcome.killed_trainers
    assert outcome.killed_servers
    assert outcome.shared > outcome.looks // 2
