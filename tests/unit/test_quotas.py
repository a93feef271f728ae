"""Accounts of held memory: nobody takes another's share, and the sum keeps to the limit."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_server.service.quotas import Account, Ledger, Memory
from npu_wire.errors import QuotaExceeded

STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), st.booleans()), max_size=60)


@settings(deadline=None)
@given(STEPS)
def test_the_sum_keeps_to_the_limit_and_every_share_is_there(steps: list[tuple[int, int, bool]]) -> None:
    """Whatever four sessions take and give: 200 bytes at most, and 25 for each of them at any time."""
    memory = Memory(200, accounts=4, patience_s=0)
    ledgers = [Ledger(Account(memory, 200)) for _ in range(4)]
    held = [0] * 4
    for who, count, gives in steps:
        if gives:
            count = min(count, held[who])
            ledgers[who].give(count)
            held[who] -= count
        elif held[who] + count <= 200:
            try:
                assert ledgers[who].take(count)
                held[who] += count
            except QuotaExceeded:
                assert held[who] + count > 25
        assert memory.used == sum(held) <= 200
    for who, ledger in enumerate(ledgers):
        if held[who] < 25:
            assert ledger.take(25 - held[who])
    for ledger in ledgers:
        ledger.close()
    assert (memory.used, memory.pooled) == (0, 0)


def test_who_waits_goes_on_when_there_is_room() -> None:
    """And who waits on a ledger that is closed hears so."""
    memory = Memory(1000, accounts=1, patience_s=0)
    account = Account(memory, 100)
    first, second, third = Ledger(account), Ledger(account), Ledger(account)
    first.take(100)
    results: dict[str, bool] = {}
    waiting = [
        threading.Thread(target=lambda: results.update(second=second.take(60))),
        threading.Thread(target=lambda: results.update(third=third.take(60))),
    ]
    for thread in waiting:
        thread.start()
    third.close()
    waiting[1].join(30)
    assert results == {"third": False}
    first.close()
    waiting[0].join(30)
    assert results == {"third": False, "second": True}
    assert account.used == 60


def test_a_full_server_says_how_full_it_is() -> None:
    """With the remedy."""
    memory = Memory(100, accounts=2, patience_s=0)
    one, two = Ledger(Account(memory, 100)), Ledger(Account(memory, 100))
    one.take(70)
    with pytest.raises(QuotaExceeded, match=r"holds 70 bytes .* no room for 60 more.*--max-server-bytes"):
        two.take(60)
    two.take(25)
