"""Each network in a process of its own, with limits of time and memory: a crash or hang is a result."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from .examine import Outcome
from .networks import Network

TIME_LIMIT_S = 180
MEMORY_LIMIT = 8 << 30


def outcomes(networks: Sequence[Network], jobs: int = 1) -> Iterator[Outcome]:
    """Examines networks, so many at a time; yields what came of each as it ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.warm"])
    waiting, running = list(networks), dict[Connection, _Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            child = _Child(context, waiting.pop(0))
            running[child.connection] = child
        first = min(child.deadline for child in running.values())
        for ended in wait(list(running), max(0.0, first - time.monotonic())):
            assert isinstance(ended, Connection)
            yield running.pop(ended).outcome()
        for connection, child in list(running.items()):
            if time.monotonic() > child.deadline:
                yield running.pop(connection).out_of_time()


class _Child:
    """A process that examines one network."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, network: Network) -> None:
        self._blank = Outcome(network.name, network.group)
        self.connection, theirs = context.Pipe(duplex=False)
        self._process: ForkServerProcess = context.Process(target=_examine, args=(network.name, theirs))
        self._process.start()
        theirs.close()
        self.deadline = time.monotonic() + TIME_LIMIT_S

    def outcome(self) -> Outcome:
        """What the process said before it ended."""
        try:
            result: Outcome = self.connection.recv()
        except EOFError:
            self._process.join()
            result = self._blank
            result.reason = f"the process ended with exit code {self._process.exitcode}"
        self._process.join()
        return result

    def out_of_time(self) -> Outcome:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._blank.status, self._blank.reason = "no time", f"not done after {TIME_LIMIT_S} s"
        return self._blank


def _examine(name: str, connection: Connection) -> None:
    """Runs in the child."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import logging
    import warnings

    import torch
    import transformers

    from .examine import examine
    from .networks import find

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    network = find(name)
    outcome = Outcome(network.name, network.group)
    examine(network, outcome)
    connection.send(outcome)
