"""The device's thread: order, turns, and errors that do not kill it."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from npu_server.service.worker import DeviceWorker, Steps
from npu_wire.errors import ServerUnavailable


def every_step_takes_a_second() -> Callable[[], float]:
    """A clock that is read before and after each step."""
    return map(float, itertools.count()).__next__


def test_sessions_take_turns_and_keep_their_order() -> None:
    """One session with five jobs does not hold up another with two."""
    worker, gate, done = DeviceWorker(every_step_takes_a_second()), threading.Event(), []
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
    worker, gate, refused = DeviceWorker(), threading.Event(), threading.Event()
    worker.submit("a", gate.wait)
    queued = worker.submit("a", lambda: "done")
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(worker.close, 30)
        while not refused.wait(0.01):
            try:
                worker.submit("a", lambda: None)
            except ServerUnavailable:
                refused.set()
        gate.set()
        assert closing.result()
    assert queued.result() == "done"


def test_a_session_that_just_ran_goes_behind_the_others() -> None:
    """Also when its queue was empty while it ran."""
    worker, began, gate, done = DeviceWorker(), threading.Event(), threading.Event(), []

    def first() -> None:
        began.set()
        gate.wait()

    worker.submit("a", first)
    assert began.wait(30)
    again = worker.submit("a", lambda: done.append("a"))
    worker.submit("b", lambda: done.append("b"))
    gate.set()
    again.result(30)
    assert worker.close(30)
    assert done == ["b", "a"]


class Hours:
    """A clock that steps move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_together(*sessions: tuple[str, int, float]) -> str:
    """Runs a job of each session, so many steps of so many hours; whose steps came in which order."""
    clock, gate, order = Hours(), threading.Event(), []
    worker = DeviceWorker(clock)

    def steps(name: str, count: int, hours: float) -> Steps[None]:
        for _ in range(count):
            clock.now += hours
            order.append(name)
            yield

    worker.submit("gate", gate.wait)
    for name, count, hours in sessions:
        worker.submit_steps(name, steps(name, count, hours))
    gate.set()
    assert worker.close(30)
    return "".join(order)


def test_the_device_is_shared_by_time() -> None:
    """Steps of an hour against ten of an eighth: b waits for one step of a's, and catches up."""
    assert run_together(("a", 3, 1.0), ("b", 10, 0.125)) == "a" + 8 * "b" + "a" + 2 * "b" + "a"


def test_time_is_not_saved_up() -> None:
    """Who comes late does not get the device until it has had as much of it as the others."""
    clock, order, late = Hours(), [], []
    worker = DeviceWorker(clock)

    def steps(name: str, count: int) -> Steps[None]:
        for step in range(count):
            clock.now += 1
            order.append(name)
            if (name, step) == ("a", 4):
                late.append(worker.submit_steps("b", steps("b", 4)))
            yield

    worker.submit_steps("a", steps("a", 9)).result(30)
    late[0].result(30)
    assert worker.close(30)
    assert "".join(order) == "aaaaa" + "babababa"


def test_the_last_job_comes_after_every_queued_one() -> None:
    """Whatever the queues' turns are: three sessions with work, and the device's own end."""
    worker, gate, done = DeviceWorker(), threading.Event(), []
    worker.submit("x", gate.wait)
    for name in ("a", "a", "b", "c", "c", "c"):
        worker.submit(name, lambda job=name: done.append(job))
    assert not worker.close(0, lambda: done.append("end"))
    gate.set()
    assert worker.close(30)
    assert sorted(done[:-1]) == ["a", "a", "b", "c", "c", "c"]
    assert done[-1] == "end"


def test_who_waits_for_a_device_that_hangs_is_told() -> None:
    """When closing takes too long, waiting for a job ends with ServerUnavailable."""
    worker, gate = DeviceWorker(), threading.Event()
    hanging, waiting = worker.submit("a", gate.wait), worker.submit("a", lambda: None)
    assert not worker.close(0)
    for future in (hanging, waiting):
        with pytest.raises(ServerUnavailable):
            future.result(30)
    gate.set()
    assert worker.close(30)
