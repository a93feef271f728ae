"""Functions of one number, as ONNX defines them, for tables."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npu_server.numerics import single_precision

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NumberFunction:
    """A function of one number.

    Attributes:
        compute: (x, alpha, beta) -> value, in x's own floating-point type; NaN where there is none.
        defaults: of alpha and beta, ONNX's.
        bounds: of its values, where they are known without calibration.
    """

    compute: Callable[[Array, float, float], Array]
    defaults: tuple[float, float] = (0.0, 0.0)
    bounds: tuple[float, float] | None = None


def _exp(x: Array) -> Array:
    return single_precision.exp(x) if x.dtype == np.float32 else np.exp(x)


def _expm1(x: Array) -> Array:
    return single_precision.expm1(x) if x.dtype == np.float32 else np.expm1(x)


def _tanh(x: Array) -> Array:
    return single_precision.tanh(x) if x.dtype == np.float32 else np.tanh(x)


def _sigmoid(x: Array) -> Array:
    if x.dtype == np.float32:
        return 1 / (1 + _exp(-x))  # TFLite's
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _erf(x: Array) -> Array:
    return np.array([math.erf(v) for v in x.reshape(-1).tolist()], x.dtype).reshape(x.shape)


def _gelu_tanh(x: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    value: Array = x * 0.5 * (1 + _tanh(inner))
    return value


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x >= 0, x, alpha * _expm1(np.minimum(x, 0)))


_SELU = (1.6732632423543772, 1.0507009873554805)

FUNCTIONS: dict[str, NumberFunction] = {
    "Abs": NumberFunction(lambda x, a, b: np.abs(x)),
    "Celu": NumberFunction(lambda x, a, b: np.maximum(x, 0) + np.minimum(0, a * np.expm1(x / a)), (1.0, 0.0)),
    "Cos": NumberFunction(lambda x, a, b: np.cos(x), bounds=(-1.0, 1.0)),
    "Elu": NumberFunction(lambda x, a, b: _elu(x, a), (1.0, 0.0)),
    "Erf": NumberFunction(lambda x, a, b: _erf(x), bounds=(-1.0, 1.0)),
    "Exp": NumberFunction(lambda x, a, b: _exp(x)),
    "Gelu": NumberFunction(lambda x, a, b: x * 0.5 * (1 + _erf(x / math.sqrt(2)))),
    "GeluTanh": NumberFunction(lambda x, a, b: _gelu_tanh(x)),
    "Greater": NumberFunction(lambda x, a, b: x > a),
    "GreaterOrEqual": NumberFunction(lambda x, a, b: x >= a),
    "HardSigmoid": NumberFunction(lambda x, a, b: np.clip(x * a + b, 0.0, 1.0), (0.2, 0.5), (0.0, 1.0)),
    "HardSwish": NumberFunction(lambda x, a, b: x * np.clip(x / 6 + 0.5, 0.0, 1.0)),
    "LeakyRelu": NumberFunction(lambda x, a, b: np.where(x >= 0, x, x * a), (0.01, 0.0)),
    "Less": NumberFunction(lambda x, a, b: x < a),
    "LessOrEqual": NumberFunction(lambda x, a, b: x <= a),
    "Log": NumberFunction(lambda x, a, b: np.log(x)),
    "Mish": NumberFunction(lambda x, a, b: x * _tanh(_softplus(x))),
    "Neg": NumberFunction(lambda x, a, b: -x),
    "Pow": NumberFunction(lambda x, a, b: np.power(x, a)),
    "Reciprocal": NumberFunction(lambda x, a, b: a / x, (1.0, 0.0)),
    "Selu": NumberFunction(lambda x, a, b: b * _elu(x, a), _SELU),
    "Sigmoid": NumberFunction(lambda x, a, b: _sigmoid(x), bounds=(0.0, 1.0)),
    "Sin": NumberFunction(lambda x, a, b: np.sin(x), bounds=(-1.0, 1.0)),
    "Softplus": NumberFunction(lambda x, a, b: _softplus(x)),
    "Softsign": NumberFunction(lambda x, a, b: x / (1 + np.abs(x)), bounds=(-1.0, 1.0)),
    "Sqrt": NumberFunction(lambda x, a, b: np.sqrt(x)),
    "Tanh": NumberFunction(lambda x, a, b: _tanh(x), bounds=(-1.0, 1.0)),
    "ThresholdedRelu": NumberFunction(lambda x, a, b: np.where(x > a, x, 0), (1.0, 0.0)),
}
"""ONNX operator (Gelu's tanh approximation: "GeluTanh") -> what it computes."""


def evaluate(name: str, x: Array, alpha: float, beta: float) -> Array:
    """Value of a function; outside of its domain (a negative code under a root) NaN or infinity."""
    with np.errstate(all="ignore"):
        return FUNCTIONS[name].compute(x, alpha, beta)
