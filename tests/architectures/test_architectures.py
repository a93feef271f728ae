"""Networks that others wrote run whole: equal on both backends, as an independent engine says, trainable."""

import functools
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from judges import engines

from .catalogue import CATALOGUE, Architecture
from .examine import Examination, Prepared
from .judging import judge_network

PROFILES = ("onnxruntime", "pow2-trunc")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on shared cores are slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def prepared(name: str) -> Prepared:
    """A network, captured once for all tests of it."""
    architecture = next(a for a in CATALOGUE if a.name == name)
    pytest.importorskip(architecture.package)
    return Prepared(architecture)


@functools.lru_cache(maxsize=1)
def examined(name: str, profile: str) -> Examination:
    """What came of it."""
    return prepared(name).examine(profile)


def _parameter(architecture: Architecture) -> object:
    marks = () if architecture.fast else (pytest.mark.slow,)
    return pytest.param(architecture.name, marks=marks, id=architecture.name)


@pytest.fixture(params=[_parameter(a) for a in CATALOGUE], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    """Each network of the catalogue; the module scope keeps the tests of one together."""
    return str(request.param)


def test_every_tensor_is_equal_on_both_backends(name: str) -> None:
    """In a training step emulator and reference agree on every number, many computed by code of their own."""
    result = examined(name, "tflm")
    assert result.mismatches == 0
    assert result.elements > 0.4 * sum(layer.elements for layer in result.layers)


def test_noise_reaches_every_layer(name: str) -> None:
    """Each INT8 tensor that adds noise has an FP32 value to be injected into, and is close to it."""
    result = examined(name, "tflm")
    assert result.missing == ()
    assert statistics.median(noise.sqnr_db for _, noise in result.noisy) > 20


def test_gradients_reach_every_parameter(name: str) -> None:
    """A training step through the NPU gives every parameter a finite gradient, and nearly all one at all."""
    gradients = examined(name, "tflm").gradients
    assert gradients.without == ()
    assert gradients.not_finite == ()
    assert len(gradients.zero) < 0.05 * gradients.parameters, gradients.zero


def test_tflm_computes_the_same(name: str) -> None:
    """TensorFlow Lite for Microcontrollers agrees on every layer that it has an operator for: on most."""
    result = examined(name, "tflm")
    verdict = judge_network(engines.find("TFLM"), result.model, result.ranges, "tflm", result.input_codes)
    assert verdict.wrong == ()
    assert verdict.layers > 0.5 * len(result.arithmetic), dict(verdict.unjudged)


@pytest.mark.parametrize("profile", PROFILES)
def test_other_arithmetic_is_equal_on_both_backends(name: str, profile: str) -> None:
    """Float32 requantization, and powers of two that are cut off, agree as well."""
    result = examined(name, profile)
    assert result.mismatches == 0
    assert np.isfinite(result.output_sqnr_db)
