"""Asks the server, all the while, what must always be answered: Describe, health, and /healthz."""

import threading
import time
import urllib.request
from collections import Counter

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from npu_wire.channel import status_parts
from npu_wire.v1 import npu_pb2, npu_pb2_grpc

from .foe import Place

_PERIOD_S = 1.0
_TIMEOUT_S = 20.0


class Pulse:
    """A thread that asks.

    Args:
        place: the server.

    Attributes:
        answers: question and its outcome -> how often.
        longest_s: the longest that an answer took.
    """

    def __init__(self, place: Place) -> None:
        self.answers: Counter[str] = Counter()
        self.longest_s = 0.0
        self._place = place
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse")
        self._thread.start()

    def stop(self) -> list[str]:
        """Ends, and tells which questions were not answered."""
        self._stop.set()
        self._thread.join()
        return [f"{said}: {n} times" for said, n in self.answers.items() if not said.endswith(" OK")]

    def _run(self) -> None:
        host, port = self._place.grpc
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            npu, health = npu_pb2_grpc.NpuServiceStub(channel), health_pb2_grpc.HealthStub(channel)
            url = f"http://127.0.0.1:{self._place.http[1]}/healthz"
            questions = {
                "Describe": lambda: npu.Describe(npu_pb2.DescribeRequest(), timeout=_TIMEOUT_S),
                "health": lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S),
                "/healthz": lambda: urllib.request.urlopen(url, timeout=_TIMEOUT_S).close(),
            }
            while not self._stop.wait(_PERIOD_S):
                for name, ask in questions.items():
                    begin = time.monotonic()
                    try:
                        ask()
                        outcome = "OK"
                    except grpc.RpcError as error:
                        outcome = " ".join(str(part) for part in status_parts(error))[:200]
                    except OSError as error:
                        outcome = f"{type(error).__name__}: {error}"[:200]
                    self.answers[f"{name} {outcome}"] += 1
                    self.longest_s = max(self.longest_s, time.monotonic() - begin)
