"""Answers on their way from the device's thread to a client that reads them when it likes."""

import threading
from collections import deque
from typing import Generic, TypeVar

from npu_wire.errors import NpuError

Answer = TypeVar("Answer")


class Outbox(Generic[Answer]):
    """A queue with two ends of its own: in order, or now."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: deque[Answer] = deque()
        self._error: NpuError | None = None
        self._ended = False
        self._dropped = False

    def put(self, answer: Answer) -> None:
        """Adds an answer; nothing happens when the outbox takes no more."""
        with self._changed:
            if not self._ended:
                self._answers.append(answer)
                self._changed.notify()

    def get(self) -> Answer | None:
        """Waits for the next answer; None is the end.

        Raises:
            NpuError: the error that the stream ends with.
        """
        with self._changed:
            while not self._answers and not self._ended:
                self._changed.wait()
            if self._answers:
                return self._answers.popleft()
            error, self._error = self._error, None
        if error is None:
            return None
        try:
            raise error
        finally:
            del error

    def end(self, error: NpuError | None) -> None:
        """Takes no more; what is there is delivered, and then the error. A second end changes nothing."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, _without_frames(error)
                self._changed.notify()

    def drop(self, error: NpuError | None) -> None:
        """Ends now, and forgets what is there."""
        with self._changed:
            self._answers.clear()
            self._ended = self._dropped = True
            self._error = _without_frames(error) or self._error
            self._changed.notify()

    @property
    def dropped(self) -> bool:
        """Whether what is taken from it need not be delivered to the end."""
        return self._dropped


def _without_frames(error: NpuError | None) -> NpuError | None:
    """Its frames hold the stream, whose outbox would hold the error: a cycle around the whole program."""
    if error is not None:
        error.__traceback__ = None
    return error
