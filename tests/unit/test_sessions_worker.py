"""The device's thread: order, turns, and errors that do not kill it."""

import threading

import pytest

from npu_server.worker import DeviceWorker
from npu_wire.errors import ServerUnavailable


def test_sessions_take_turns_and_keep_their_order() -> None:
    """One session with five jobs does not hold up another with two."""
    worker, gate, done = DeviceWorker(), threading.Event(), []
    first = worker.submit("x", gate.wait)
    for name, count in (("a", 5), ("b", 2)):
        for k in range(count):
            last = worker.submit(name, lambda job=f"{name}{k}": done.append(job))
    assert worker.depth() in (7, 8)  # 8: the thread has not fetched the gate's job yet
    gate.set()
    assert first.result()
    last.result()
    assert worker.close(10)
    assert done == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_an_exception_reaches_its_caller_only() -> None:
    """The next job runs."""
    worker = DeviceWorker()
    with pytest.raises(ZeroDivisionError):
        worker.submit("a", lambda: 1 // 0).result()
    assert worker.submit("a", lambda: 42).result() == 42
    worker.close(10)


def test_closing_finishes_what_is_queued_and_refuses_the_rest() -> None:
    """A job after close is ServerUnavailable."""
    worker, gate = DeviceWorker(), threading.Event()
    worker.submit("a", gate.wait)
    queued = worker.submit("a", lambda: "done")
    assert not worker.close(0)
    with pytest.raises(ServerUnavailable):
        worker.submit("a", lambda: None)
    gate.set()
    assert worker.close(10)
    assert queued.result() == "done"
