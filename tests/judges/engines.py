"""The judges that are installed, by the name that profiles call them."""

import functools
import importlib

from .layers import Judge

_MODULES = {
    "TFLM": "tflite",
    "LiteRT reference": "tflite",
    "LiteRT ruy": "tflite",
    "LiteRT XNNPACK": "tflite",
    "ONNX Runtime": "onnx_qlinear",
    "TOSA single rounding": "tosa",
    "TOSA double rounding": "tosa",
}
NAMES = tuple(_MODULES)


@functools.cache
def find(name: str) -> Judge:
    """A judge.

    Raises:
        ImportError: its engine is not installed; `make conformance` installs them all.
    """
    module = importlib.import_module(f".{_MODULES[name]}", __package__)
    return next(judge for judge in module.JUDGES if judge.name == name)
