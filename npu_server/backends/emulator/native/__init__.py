"""Kernels in C++, where a compiler made them: sums and requantization in one pass, exact to the bit."""

from npu_server.backends.emulator.native.layers import NativeLayer, bind
from npu_server.backends.emulator.native.library import Level, levels

__all__ = ["Level", "NativeLayer", "bind", "levels"]
