"""The C library's free lists, which Python cannot steer; where it is not glibc nothing happens."""

import contextlib
import ctypes
import os

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_INT_MAX = 2**31 - 1
_OF_THE_USER = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def use_one_arena() -> None:
    """Makes all threads share one heap, where the C library is glibc; to be called before there are threads.

    glibc has up to eight arenas a core. In time each is as large as one ever had to be, and glibc gives back
    the top of none but the first, whatever it is asked (malloc_trim(3)).
    """
    _mallopt(_M_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Lets large blocks come from the heap, which is not given back in between.

    Otherwise each large tensor is mapped anew, its pages cleared one by one: thousands of page faults a
    training step. What the user has set in the environment stays.
    """
    if not any(name in os.environ for name in _OF_THE_USER):
        _mallopt(_M_MMAP_MAX, 0)
        _mallopt(_M_TRIM_THRESHOLD, _INT_MAX)


def return_free_memory() -> None:
    """Gives memory that is free already back to the system, where the C library is glibc.

    glibc keeps what was freed for the next request: after many large sessions that is hundreds of megabytes.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).mallopt(parameter, value)
