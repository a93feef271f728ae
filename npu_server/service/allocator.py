"""The C library's free lists, which Python cannot empty."""

import contextlib
import ctypes

_M_ARENA_MAX = -8  # of glibc's malloc.h


def use_one_arena() -> None:
    """Makes all threads share one heap, where the C library is glibc; to be called before there are threads.

    glibc has up to eight arenas a core. In time each is as large as one ever had to be, and glibc gives back
    the top of none but the first, whatever it is asked (malloc_trim(3)).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def return_free_memory() -> None:
    """Gives memory that is free already back to the system, where the C library is glibc.

    glibc keeps what was freed for the next request: after many large sessions that is hundreds of megabytes.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
