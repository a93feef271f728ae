"""Patience with a client, on a clock of its own."""

from npu_server.service.admission import Lobby
from npu_server.service.stalls import StallWatch, Wait


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_patience_runs_out_over_many_waits_and_grows_with_what_comes() -> None:
    """10 s in all: 4 s, then 5 s with half a second of bytes, leave 1.5 s; a new thing has 10 s again."""
    clock = Clock()
    wait = Wait(10, lambda: None, clock)
    wait.start()
    assert wait.due == 110
    clock.now = 104
    wait.stop(0)
    assert wait.due is None
    clock.now = 150  # the server's own time
    wait.start()
    assert wait.due == 156
    clock.now = 155
    wait.stop(2**15)
    wait.start()
    assert wait.due == 156.5
    wait.renew()
    wait.start()
    assert wait.due == 165


def test_bytes_never_make_more_patience_than_there_was() -> None:
    """However fast they come."""
    clock = Clock()
    wait = Wait(10, lambda: None, clock)
    wait.start()
    wait.stop(2**30)
    wait.start()
    assert wait.due == 110


def test_time_in_which_the_server_stood_still_is_nobodys_silence() -> None:
    """Of an hour between two looks half a second counts, of half a second all of it."""
    clock, ended = Clock(), []
    watch = StallWatch(clock)
    watch.after(10, lambda: ended.append(True))
    clock.now += 3600
    watch.tick()
    for _ in range(18):
        clock.now += 0.5
        watch.tick()
    assert ended == []
    clock.now += 0.5
    watch.tick()
    assert ended == [True]
    watch.close()


def test_the_oldest_in_the_lobby_gives_way() -> None:
    """Not one that has left already."""
    lobby, ended = Lobby(2), []
    for name in ("a", "b", "c"):
        ticket = lobby.enter()
        ticket.bind(lambda name=name: ended.append(name))
        if name == "a":
            lobby.leave(ticket)
    assert ended == []
    lobby.enter()
    assert ended == ["b"]
