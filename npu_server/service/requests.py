"""The messages of a call, parsed here instead of in gRPC, with an end to waiting for them."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError

from npu_server.service.stalls import Wait
from npu_wire.errors import InvalidInput

Message = TypeVar("Message")


class Requests(Iterator[Message], Generic[Message]):
    """What a client sends in one call.

    gRPC keeps 16 KB for ever of each message that its own deserializer fails on, and blames the server.

    Args:
        raw: the messages' bytes.
        parse: makes a message of them.
        wait: ends the call when the client is silent for too long.
        arrived: called when the first message is there.

    Attributes:
        awaited: whether the client owes the next message, so that its silence ends the call: true for the
            first one, and then what the reader of the messages says.
    """

    def __init__(
        self,
        raw: Iterator[bytes],
        parse: Callable[[bytes], Message],
        wait: Wait,
        arrived: Callable[[], None],
    ) -> None:
        self.awaited = True
        self._raw = raw
        self._parse = parse
        self._wait = wait
        self._arrived: Callable[[], None] | None = arrived

    def __next__(self) -> Message:
        """Waits for the next message.

        Raises:
            StopIteration: the client has said everything.
            InvalidInput: bytes that are no such message.
            grpc.RpcError: the call is over.
        """
        size = 0
        if self.awaited:
            self._wait.start()
        try:
            raw = next(self._raw)
            size = len(raw)
        finally:
            if self.awaited:
                self._wait.stop(size)
            else:
                self._wait.renew()
        if self._arrived is not None:
            self._arrived()
            self._arrived = None
            self.awaited = False
        try:
            return self._parse(raw)
        except DecodeError as error:
            raise InvalidInput(
                f"a message of {size} bytes is not what this method takes ({error}); "
                "make the client's code from proto/npu_wire/v1"
            ) from None

    def only(self) -> Message:
        """The one message of a call that has just one.

        Raises:
            InvalidInput: there is none, or it cannot be parsed.
        """
        for message in self:
            return message
        raise InvalidInput("the call ended before its message")

    def on_stall(self, end: Callable[[], object]) -> None:
        """Replaces what happens when the client is silent for too long."""
        self._wait.expire = end
