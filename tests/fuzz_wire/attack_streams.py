"""Attacks that are behaviour: cancelling, reading slowly or never, saying nothing, and often."""

import threading
import time
from collections.abc import Callable

from npu_wire.v1 import npu_pb2

from .foe import HEALTH, NPU, OURS, REFLECTION, Foe, RefusedError
from .recordings import attach


def cancelled(foe: Foe) -> str:
    """A call that is given up at any moment: before, in, or after its messages."""
    rng = foe.rng
    patience_s = rng.choice((0.001, 0.01, 0.05, 0.3)) * rng.random()
    if rng.random() < 0.3:
        return foe.converse(NPU + "Compile", foe.small.compile, patience_s=patience_s).status
    recording = rng.choice((foe.small, foe.wide))
    session_id = foe.open(recording)
    messages = [attach(session_id), *recording.forward]
    if rng.random() < 0.5:
        status = foe.converse(NPU + "Forward", messages, read=rng.randint(0, 12)).status
    else:
        status = foe.converse(NPU + "Forward", messages, patience_s=patience_s).status
    foe.leave(session_id)
    return status


def slow_reader(foe: Foe) -> str:
    """A legal session that is read with pauses; its bits must be right."""
    recording = foe.rng.choice((foe.small, foe.wide))
    session_id = foe.open(recording)
    outcome = foe.replay(session_id, recording, pause_s=foe.rng.uniform(0.01, 0.2), patience_s=15.0)
    foe.leave(session_id)
    return outcome.status


def never_reads(foe: Foe) -> str:
    """A session whose answers fill every buffer while nobody takes them."""
    session_id = foe.open(foe.wide)
    _unread(foe, session_id, foe.rng.uniform(0.5, 6.0))
    foe.leave(session_id)
    return OURS


def replaced_streams(foe: Foe) -> str:
    """Streams of one session, none of them read, each replaced by the next; the last is read and right."""
    session_id = foe.open(foe.wide)
    streams = [
        threading.Thread(target=_unread, args=(foe, session_id, foe.rng.uniform(0.5, 4.0)))
        for _ in range(foe.rng.randint(2, 8))
    ]
    for stream in streams:
        stream.start()
        time.sleep(foe.rng.uniform(0.0, 0.2))
    for stream in streams:
        stream.join()
    status = foe.converse(NPU + "Forward", [attach(session_id)]).status
    foe.leave(session_id)
    return status


def silent(foe: Foe) -> str:
    """Calls that are opened and say nothing, or nothing more."""
    rng = foe.rng
    method, messages = rng.choice(
        (
            (NPU + "Forward", []),
            (NPU + "Compile", []),
            (NPU + "Compile", list(foe.small.compile[: rng.randint(1, 3)])),
            (HEALTH + "Watch", [b""]),
            (HEALTH + "Watch", []),
            (NPU + "Describe", []),
            (REFLECTION, []),
        )
    )
    hold_s = rng.uniform(0.5, foe.longest_s)
    return foe.converse(method, messages, hold_s=hold_s, patience_s=hold_s).status


def silent_stream(foe: Foe) -> str:
    """A stream that is attached, begins something, and then says nothing more."""
    session_id = foe.open(foe.small)
    messages = [attach(session_id), *foe.small.forward[: foe.rng.randint(0, 6)]]
    hold_s = foe.rng.uniform(0.5, foe.longest_s)
    outcome = foe.converse(NPU + "Forward", messages, hold_s=hold_s, patience_s=hold_s)
    foe.leave(session_id)
    return outcome.status


def many_calls(foe: Foe) -> str:
    """Dozens of calls at once, of which most are refused; none may be forgotten."""
    session_id = foe.open(foe.small)
    kinds: tuple[Callable[[], object], ...] = (
        lambda: foe.converse(NPU + "Forward", [attach(session_id)], hold_s=1.0, patience_s=3.0),
        lambda: foe.converse(NPU + "Forward", [], hold_s=1.0, patience_s=2.0),
        lambda: foe.converse(NPU + "Compile", [], hold_s=1.0, patience_s=2.0),
        lambda: foe.converse(HEALTH + "Watch", [b""], patience_s=1.0),
        lambda: foe.converse(NPU + "Describe", [b""]),
    )
    calls = [threading.Thread(target=foe.rng.choice(kinds)) for _ in range(foe.rng.randint(10, 50))]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    foe.leave(session_id)
    return "done"


def half_closed(foe: Foe) -> str:
    """The sending side is closed in the middle of a tensor, an update or a model."""
    if foe.rng.random() < 0.3:
        cut = foe.rng.randrange(len(foe.small.compile))
        return foe.converse(NPU + "Compile", foe.small.compile[:cut]).status
    session_id = foe.open(foe.small)
    messages = foe.small.forward[: foe.rng.randrange(len(foe.small.forward))]
    outcome = foe.replay(session_id, foe.small) if foe.rng.random() < 0.3 else None
    outcome = outcome or foe.converse(NPU + "Forward", [attach(session_id), *messages])
    foe.leave(session_id)
    return outcome.status


def abandoned(foe: Foe) -> str:
    """The connection is closed over open calls, or sessions are opened and forgotten."""
    for _ in range(foe.rng.randint(1, 3)):
        session_id = foe.open(foe.small)
    stream = threading.Thread(
        target=foe.converse,
        args=(NPU + "Forward", [attach(session_id)]),
        kwargs={"hold_s": 3.0, "patience_s": 5.0},
    )
    stream.start()
    time.sleep(foe.rng.uniform(0.0, 0.1))
    foe.reconnect()
    stream.join()
    return "done"


def released_under_way(foe: Foe) -> str:
    """A session that is released while its stream is busy."""
    session_id = foe.open(foe.wide)
    stream = threading.Thread(target=_unread, args=(foe, session_id, 3.0))
    stream.start()
    time.sleep(foe.rng.uniform(0.0, 0.3))
    request = npu_pb2.ReleaseRequest(session_id=session_id).SerializeToString()
    status = foe.converse(NPU + "Release", [request]).status
    stream.join()
    return status


def _unread(foe: Foe, session_id: str, hold_s: float) -> None:
    # Reading takes a pause longer than the call lives, so that nothing but its first answer is taken.
    try:
        foe.converse(
            NPU + "Forward",
            [attach(session_id), *foe.wide.forward],
            hold_s=hold_s,
            patience_s=hold_s,
            pause_s=hold_s + 0.1,
            read=1,
        )
    except RefusedError:
        return
