"""Memory that nobody uses goes back to the system.

glibc keeps what is freed, in an arena for each of many threads, and of all but the first it never gives
the top back: after some hundred sessions that came and went a server that used 180 MB of heap held 500.
"""

import ctypes
import time
from collections.abc import Callable

_LIBC = ctypes.CDLL(None)
_PAUSE_S = 10.0
_M_ARENA_MAX = -8  # of glibc's malloc.h


def use_one_arena() -> None:
    """To be called before there are threads; does nothing where there is no glibc."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Gives free pages back; does nothing where there is no glibc."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(ctypes.c_size_t(0))


class Trimmer:
    """Trims after something large has ended, and once more for what was freed late.

    Args:
        trim: does it; some milliseconds for a gigabyte.
        clock: monotonic seconds.
    """

    def __init__(self, trim: Callable[[], None] = trim, clock: Callable[[], float] = time.monotonic) -> None:
        self._trim = trim
        self._clock = clock
        self._left = 0
        self._next = 0.0

    def something_ended(self) -> None:
        """A session, a stream or a model is gone."""
        self._left = 2

    def check(self) -> None:
        """To be called now and then; the pause between two trims is ten seconds."""
        if self._left and self._clock() >= self._next:
            self._left -= 1
            self._trim()
            self._next = self._clock() + _PAUSE_S
