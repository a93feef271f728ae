"""The process of the hostile clients: a thread each, every one with its own random stream."""

import collections
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

from tests.hostile_models import hostile_models

from . import attack_messages as messages
from . import attack_sockets as sockets
from . import attack_streams as streams
from .foe import Foe, Place, RefusedError, WrongBitsError
from .recordings import record_small, record_wide

Outcomes = collections.Counter[str]

# Attack and how often it is chosen.
ATTACKS: dict[Callable[[Foe], str], int] = {
    messages.undecodable: 6,
    messages.mutated_compile: 6,
    messages.mutated_forward: 8,
    messages.mutated_fields: 8,
    messages.sizes: 6,
    messages.unknown_names: 4,
    messages.unfinished_updates: 4,
    messages.too_many_batches: 3,
    messages.hostile_model: 6,
    messages.odd_metadata: 3,
    streams.cancelled: 8,
    streams.slow_reader: 2,
    streams.never_reads: 3,
    streams.replaced_streams: 3,
    streams.silent: 4,
    streams.silent_stream: 3,
    streams.many_calls: 2,
    streams.half_closed: 4,
    streams.abandoned: 2,
    streams.released_under_way: 3,
    sockets.http2_garbage: 8,
    sockets.http_garbage: 8,
    sockets.connections: 2,
    sockets.broken_connection: 4,
}
# Where bytes change under gRPC's feet, gRPC's own client may call that an internal error.
_TAMPER = {sockets.broken_connection}
_BAD_STATUS = ("UNKNOWN", "INTERNAL", "DATA_LOSS")
_MAX_VIOLATIONS = 100


@dataclass(frozen=True)
class Army:
    """What the hostile clients are.

    Attributes:
        place: the server.
        seed: of all their random streams.
        clients: how many.
        pause_s: mean pause of each between attacks.
        longest_s: the longest that one holds still.
    """

    place: Place
    seed: int
    clients: int
    pause_s: float
    longest_s: float


def run(army: Army, going: Event, ending: Event, results: Connection) -> None:
    """The main function of the process: attacks while `going`, sends its tally when `ending`."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    models = [(title, model) for title, model in hostile_models() if len(model) < 2**22]
    small, wide = record_small(), record_wide()
    clients = [
        Client(
            Foe(army.place, f"{army.seed}/{number}", small, wide, models, army.longest_s),
            number,
            army.pause_s,
            going,
            ending,
        )
        for number in range(army.clients)
    ]
    for client in clients:
        client.join()
    tally = {attack.__name__: Outcomes() for attack in ATTACKS}
    for client in clients:
        for name, outcomes in client.tally.items():
            tally[name] += outcomes
    results.send(
        {
            "attacks": {name: dict(outcomes.most_common()) for name, outcomes in tally.items()},
            "violations": [violation for client in clients for violation in client.violations],
        }
    )
    results.close()
    sys.stdout.flush()
    # gRPC's threads may still sit on calls that were given up; nothing here is worth waiting for.
    os._exit(0)


class Client(threading.Thread):
    """One hostile client.

    Args:
        foe: its channel and random stream.
        number: which it is.
        pause_s: mean pause between attacks.
        going: attacks while it is set.
        ending: ends when it is set.
    """

    def __init__(self, foe: Foe, number: int, pause_s: float, going: Event, ending: Event) -> None:
        super().__init__(name=f"hostile-{number}", daemon=True)
        self.tally: dict[str, Outcomes] = collections.defaultdict(Outcomes)
        self.violations: list[str] = []
        self._foe = foe
        self._number = number
        self._pause_s = pause_s
        self._going = going
        self._ending = ending
        self.start()

    def run(self) -> None:
        """Attacks until the end."""
        foe, round_ = self._foe, 0
        self._going.wait()
        # First of all the server's threads and buffers are filled, so that they cannot look like leaks later.
        for attack in (streams.many_calls, streams.never_reads, streams.replaced_streams):
            self._attack(attack, round_)
        while not self._ending.is_set():
            if not self._going.is_set():
                foe.close()
                while not self._going.wait(0.2):
                    if self._ending.is_set():
                        return
                foe.reconnect()
            (attack,) = foe.rng.choices(list(ATTACKS), list(ATTACKS.values()))
            self._attack(attack, round_)
            round_ += 1
            self._ending.wait(foe.rng.expovariate(1 / self._pause_s))
        foe.close()

    def _attack(self, attack: Callable[[Foe], Any], round_: int) -> None:
        name = attack.__name__
        try:
            outcome = attack(self._foe)
        except RefusedError as refusal:
            outcome = f"no session: {refusal}"
        except WrongBitsError as error:
            outcome = "WRONG BITS"
            self._violated(f"{name}, client {self._number}, round {round_}: {error}")
        except Exception as error:
            outcome = f"{type(error).__name__} in the harness"
            self._violated(f"{name}, client {self._number}, round {round_}: {traceback.format_exc()}")
        self.tally[name][outcome] += 1
        if attack not in _TAMPER and any(word in outcome for word in _BAD_STATUS):
            self._violated(f"{name}, client {self._number}, round {round_}: {outcome}")

    def _violated(self, what: str) -> None:
        if len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append(what[-2000:])
