"""Memory that is free goes back to the system when sessions end."""

import subprocess
import sys

_FRAGMENTS = """
import ctypes
import threading

from npu_server.allocator import return_free_memory


def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def fill_and_free():
    # Too small for pages of their own, and one that stays above them all: nothing shrinks by itself.
    blocks = [ctypes.create_string_buffer(65_536) for _ in range(3_200)]
    pins.append(ctypes.create_string_buffer(65_536))
    del blocks


pins = []
thread = threading.Thread(target=fill_and_free)
thread.start()
thread.join()
before = resident_mib()
return_free_memory()
print(before - resident_mib())
"""


def test_what_is_free_goes_back_to_the_system() -> None:
    """200 MiB in blocks of 64 KiB below one that is in use: glibc keeps them until it is asked."""
    run = subprocess.run([sys.executable, "-c", _FRAGMENTS], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 150
