"""What a hostile client can do with a channel: raw messages to any method, and its own end of the call."""

import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np

from npu_wire.channel import client_options, status_parts
from npu_wire.errors import NpuError
from npu_wire.tensors import TensorAssembler
from npu_wire.v1 import npu_pb2

from .recordings import Recording, attach

NPU = "/npu_wire.v1.NpuService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = (
    *(NPU + name for name in ("Describe", "Compile", "Forward", "KeepAlive", "Release")),
    *(HEALTH + name for name in ("Check", "Watch", "List")),
    REFLECTION,
)
OURS = "CANCELLED by client"

Metadata = Sequence[tuple[str, str | bytes]]


class WrongBitsError(Exception):
    """The server answered a legal session with other bits than `reference`."""


class RefusedError(Exception):
    """The server gave no session."""


@dataclass(frozen=True)
class Place:
    """Where the server listens: gRPC and HTTP, each host and port, on loopback."""

    grpc: tuple[str, int]
    http: tuple[str, int]


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        status: gRPC status and npu-error, or `OURS`.
        answers: raw responses.
    """

    status: str
    answers: tuple[bytes, ...]


class Foe:
    """A hostile client with a random stream of its own.

    Args:
        place: the server.
        seed: of everything it draws.
        small: a recording of tiny tensors.
        wide: a recording of large ones.
        models: hostile models by title.
        longest_s: the longest that it holds still.
    """

    def __init__(
        self,
        place: Place,
        seed: str,
        small: Recording,
        wide: Recording,
        models: Sequence[tuple[str, bytes]],
        longest_s: float,
    ) -> None:
        self.rng = random.Random(seed)
        self.place = place
        self.small = small
        self.wide = wide
        self.models = models
        self.longest_s = longest_s
        self._channel = self._connect()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def reconnect(self) -> None:
        """Leaves the connection, with whatever is open on it, for a new one."""
        self._channel.close()
        self._channel = self._connect()

    def converse(
        self,
        method: str,
        messages: Iterable[bytes],
        *,
        patience_s: float = 10.0,
        hold_s: float = 0.0,
        read: int | None = None,
        pause_s: float = 0.0,
        metadata: Metadata = (),
        channel: grpc.Channel | None = None,
    ) -> Outcome:
        """Sends raw messages and reads answers. No deadline travels: the server must not count on one.

        Args:
            method: full path.
            messages: serialized, or anything.
            patience_s: cancel after so long.
            hold_s: keep the sending side open so long after the last message.
            read: cancel after so many answers; None: read to the end.
            pause_s: between answers.
            metadata: to send.
            channel: another connection than one's own.
        """
        ended = threading.Event()

        def requests() -> Iterator[bytes]:
            yield from messages
            ended.wait(hold_s)

        call = (channel or self._channel).stream_stream(method)(requests(), metadata=tuple(metadata))
        timer = threading.Timer(patience_s, call.cancel)
        timer.start()
        answers: list[bytes] = []
        try:
            while read is None or len(answers) < read:
                answers.append(next(call))
                time.sleep(pause_s)
            call.cancel()
        except StopIteration:
            pass
        except grpc.RpcError:
            pass
        finally:
            ended.set()
            timer.cancel()
        return Outcome(_status(call), tuple(answers))

    def open(self, recording: Recording) -> str:
        """Opens a session and returns its id.

        Raises:
            RefusedError: there is none to be had.
        """
        outcome = self.converse(NPU + "Compile", recording.compile, patience_s=60.0)
        if not outcome.answers:
            raise RefusedError(outcome.status)
        return npu_pb2.CompileResponse.FromString(outcome.answers[0]).session_id

    def leave(self, session_id: str) -> None:
        """Releases a session, or (one in four) leaves it to its lease."""
        if self.rng.random() < 0.75:
            request = npu_pb2.ReleaseRequest(session_id=session_id).SerializeToString()
            self.converse(NPU + "Release", [request])

    def replay(self, session_id: str, recording: Recording, **how: float) -> Outcome:
        """Replays the legal session and checks what comes back.

        Raises:
            WrongBitsError: a tensor differs.
        """
        outcome = self.converse(NPU + "Forward", [attach(session_id), *recording.forward], **how)
        check_bits(recording, outcome.answers)
        return outcome

    @contextmanager
    def channel_to(self, target: str) -> Iterator[grpc.Channel]:
        """Another connection, to an address that may be a relay's."""
        channel = grpc.insecure_channel(target, options=client_options())
        try:
            yield channel
        finally:
            channel.close()

    def _connect(self) -> grpc.Channel:
        host, port = self.place.grpc
        return grpc.insecure_channel(f"{host}:{port}", options=client_options())


def check_bits(recording: Recording, answers: Sequence[bytes]) -> int:
    """Compares every complete tensor among the answers with the recording's.

    Returns:
        Elements compared.

    Raises:
        WrongBitsError: a tensor differs.
    """
    assembler: TensorAssembler | None = None
    compared = 0
    for raw in answers:
        answer = npu_pb2.ForwardResponse.FromString(raw)
        if not answer.HasField("tensor"):
            continue
        chunk, key = answer.tensor.chunk, (answer.batch_id, answer.tensor.layer)
        try:
            assembler = assembler or TensorAssembler(chunk, 2**31)
            tensor = assembler.add(chunk)
        except NpuError as error:
            raise WrongBitsError(f"batch and layer {key}: {error}") from None
        if tensor is not None:
            if not np.array_equal(tensor, recording.expected[key]):
                raise WrongBitsError(f"batch and layer {key}: other codes than reference")
            compared += tensor.size
            assembler = None
    return compared


def _status(call: grpc.Call) -> str:
    code, class_name, details = status_parts(call)
    if code == "CANCELLED" and class_name is None and details == "Locally cancelled by application!":
        return OURS
    return f"{code}/{class_name}" if class_name else code
