"""Places in shared memory, against the bytes that are due in each; both ends are real, over a socket pair."""

import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_wire.shared_memory import TOKEN_BYTES, Arena, NotShared, Slot, Window

SIZE = 4096


def connected(commit: list[int], size: int = SIZE) -> tuple[Arena, Window]:
    """Both ends; `commit` gets what is committed."""

    def committing(count: int) -> bool:
        commit.append(count)
        return True

    server, client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arena = Arena(size, committing, server)

    def hand_over() -> None:
        server.recv(TOKEN_BYTES)
        arena.hand_over()

    thread = threading.Thread(target=hand_over)
    thread.start()
    window = Window(client, bytes(TOKEN_BYTES))
    thread.join()
    return arena, window


@pytest.fixture
def committed() -> list[int]:
    """What an arena has asked for."""
    return []


@pytest.fixture
def ends(committed: list[int]) -> Iterator[tuple[Arena, Window]]:
    """An arena and its window."""
    arena, window = connected(committed)
    yield arena, window
    window.close()
    arena.close()


def bytes_of(seed: int, count: int) -> memoryview:
    """Random ones."""
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).data


@given(st.lists(st.one_of(st.integers(1, SIZE), st.integers(-20, -1)), max_size=60))
def test_no_slot_is_touched_while_it_is_out(actions: list[int]) -> None:
    """Sizes place bytes, negative numbers drop what was placed so many before; what is out stays as it is."""
    committed: list[int] = []
    arena, window = connected(committed)
    out: list[tuple[memoryview, memoryview]] = []
    for seed, action in enumerate(actions):
        if action > 0:
            due = bytes_of(seed, action)
            slot = arena.place(due)
            room = sum(-(-len(view) // 64) * 64 for view, _ in out)
            if slot is None:
                assert out
            else:
                assert room + action <= SIZE
                out.append((window.view(slot.number, slot.offset, slot.nbytes), due))
        elif -action <= len(out):
            del out[action]
        assert all(view == due for view, due in out)
    out.clear()
    whole = bytes_of(99, SIZE)
    slot = arena.place(whole)  # one piece again
    assert slot is not None
    assert window.view(slot.number, 0, SIZE) == whole
    assert sum(committed) == arena.committed == SIZE
    window.close()
    arena.close()


def test_memory_is_committed_from_the_beginning(ends: tuple[Arena, Window], committed: list[int]) -> None:
    """One slot at a time needs the memory of one, however often."""
    arena, window = ends
    for seed in range(100):
        slot = arena.place(bytes_of(seed, 1000))
        assert slot is not None
        assert (slot.number, slot.offset) == (seed + 1, 0)
        assert window.view(slot.number, slot.offset, slot.nbytes) == bytes_of(seed, 1000)
    assert committed == [1024]


def test_thousands_that_are_dropped_at_once_all_come_back() -> None:
    """More than the socket has room for: the others go when it has."""
    arena, window = connected([], 64 * 16_384)
    one = bytes_of(1, 1)

    def fill() -> list[memoryview]:
        views = []
        while (slot := arena.place(one)) is not None:
            views.append(window.view(slot.number, slot.offset, slot.nbytes))
        return views

    views = fill()
    assert len(views) == 16_384
    views.clear()
    while len(views) < 16_384:
        window.flush()
        views += fill()
    window.close()
    arena.close()


@pytest.mark.parametrize(("offset", "count"), [(0, SIZE + 1), (SIZE, 1), (2**63, 2**63), (0, 0)])
def test_nothing_beyond_the_memory_is_read(ends: tuple[Arena, Window], offset: int, count: int) -> None:
    """Whatever a server says."""
    with pytest.raises(ValueError, match="bytes at"):
        ends[1].view(1, offset, count)


def test_memory_that_can_shrink_is_not_taken() -> None:
    """A file that its owner may cut would fault under its reader."""
    server, client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, SIZE)

    def hand_over() -> None:
        server.recv(TOKEN_BYTES)
        socket.send_fds(server, [SIZE.to_bytes(8, "little")], [memory])

    thread = threading.Thread(target=hand_over)
    thread.start()
    with pytest.raises(NotShared, match="not sealed"):
        Window(client, bytes(TOKEN_BYTES))
    thread.join()
    for end in (server, client):
        end.close()
    os.close(memory)


def test_an_arena_whose_reader_is_gone_places_nothing(ends: tuple[Arena, Window]) -> None:
    """And the view that is left stays valid."""
    arena, window = ends
    slot = arena.place(bytes_of(5, 500))
    assert isinstance(slot, Slot)
    view = window.view(slot.number, slot.offset, slot.nbytes)
    window.close()
    assert arena.place(bytes_of(6, 500)) is None
    assert view == bytes_of(5, 500)
