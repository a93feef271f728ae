"""The emulator backend: bit-equal to the reference, fast, on a CPU or a GPU (torch)."""

from npu_server.backends.emulator.backend import EmulatorBackend

__all__ = ["EmulatorBackend"]
