"""The compiled kernels, if there are any: one `Level` for each instruction set that this CPU has."""

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_server.backends.emulator.native import build

log = logging.getLogger(__name__)


class Structure(ctypes.Structure):
    """`Layer` of kernels.cpp, field by field."""

    _INTEGERS = (
        *("height", "width", "channels", "out_height", "out_width", "outputs"),
        *("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left"),
        *("groups", "depthwise", "rule", "narrow", "wrapped_bits", "register_low", "register_high"),
        *("zero_point", "low", "high"),
    )
    _POINTERS = (
        *("weights", "padding", "start", "left", "mantissa", "half", "sign", "right"),
        *("nudge", "step", "shift", "factor", "wide_factor"),
    )
    _fields_ = (
        *((name, ctypes.c_int32) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


_STRUCTURE, _ADDRESS, _COUNT = ctypes.POINTER(Structure), ctypes.c_void_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "offset": (ctypes.c_int, ()),
    "positions": (_COUNT, (_STRUCTURE,)),
    "order": (None, (_STRUCTURE, _ADDRESS)),
    "packed_bytes": (_COUNT, (_STRUCTURE,)),
    "pack": (None, (_STRUCTURE, _ADDRESS, _ADDRESS)),
    "run": (ctypes.c_int, (_STRUCTURE, _ADDRESS, _ADDRESS, _COUNT, _COUNT)),
}


@dataclass(frozen=True, eq=False)
class Level:
    """The kernels for one instruction set; the functions are documented in kernels.cpp."""

    name: str
    offset: Any
    positions: Any
    order: Any
    packed_bytes: Any
    pack: Any
    run: Any


@functools.cache
def levels() -> tuple[Level, ...]:
    """Those that this CPU runs, the fastest first; none without a library that was made of this source."""
    return load(build.LIBRARY)


def load(path: Path) -> tuple[Level, ...]:
    """The kernels in a library; see `levels`."""
    if not path.exists():
        log.info(
            "no native kernels were built; torch computes instead (python %s builds them)", build.__file__
        )
        return ()
    try:
        library = ctypes.CDLL(str(path))
        library.digest.restype = ctypes.c_char_p
        current = library.digest().decode() == build.digest()
    except (OSError, AttributeError):
        current = False
    if not current:
        log.warning(
            "%s is not what its source says; torch computes instead (python %s builds it anew)",
            path,
            build.__file__,
        )
        return ()
    return tuple(_level(library, name) for name in build.levels() if library[f"{name}_supported"]())


def _level(library: ctypes.CDLL, name: str) -> Level:
    functions = {}
    for function, (result, arguments) in _FUNCTIONS.items():
        pointer = library[f"{name}_{function}"]
        pointer.restype, pointer.argtypes = result, arguments
        functions[function] = pointer
    return Level(f"native {name.replace('_', '-')}", **functions)
