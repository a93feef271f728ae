"""The C library's free lists, which Python cannot empty."""

import contextlib
import ctypes


def return_free_memory() -> None:
    """Gives memory that is free already back to the system, where the C library is glibc.

    glibc keeps what threads have freed for their next request, in up to eight arenas a core: after many
    large sessions that is hundreds of megabytes (malloc_trim(3)).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
