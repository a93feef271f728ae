"""Every way to sum integer products is exact wherever its condition lets it work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npu_server.backends.emulator.selftest import expected_sums
from npu_server.backends.emulator.sums import CPU_METHODS, CUDA_METHODS, Method, Task, exact_sums
from npu_server.compile.graph import Window
from npu_wire.layer_map import Int8Array

CPU = torch.device("cpu")


@st.composite
def tasks(draw) -> tuple[Task, Int8Array]:
    """The windows that networks have, mostly, with any channels, groups, zero point and image size."""
    kind = draw(st.sampled_from(["dense", "grouped", "depthwise"]))
    groups = 1 if kind == "dense" else draw(st.integers(1, 70 if kind == "depthwise" else 8))
    per_group = draw(st.integers(1, {"dense": 140, "grouped": 6, "depthwise": 1}[kind]))
    out = groups * draw(st.integers(1, 70 if kind == "dense" else 3))
    size, stride = draw(st.sampled_from([1, 1, 2, 3, 3, 5])), draw(st.integers(1, 2))
    kernel = (size, size) if draw(st.integers(0, 4)) else (size, 1)
    pad = draw(st.integers(0, size // 2))
    pads = (pad, pad, pad, pad) if draw(st.booleans()) else (pad, 0, 0, pad)
    rows, columns = (draw(st.integers(size, 9)) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.sampled_from([1, 30, 127]))
    codes = rng.integers(-largest, largest + 1, (out, per_group, *kernel)).astype(np.int8)
    if draw(st.booleans()):
        codes = np.abs(codes)
    zero_point = draw(st.sampled_from([-128, 0, 127]) | st.integers(-128, 127))
    low = draw(st.sampled_from([-128, 120]))
    image = rng.integers(low, 128, (draw(st.integers(1, 3)), rows, columns, groups * per_group))
    return Task(codes, zero_point, Window(kernel, (stride, stride), pads), groups), image.astype(np.int8)


@pytest.mark.parametrize("method", [*CPU_METHODS, *CUDA_METHODS], ids=lambda method: type(method).__name__)
@settings(max_examples=60, deadline=None)
@given(case=tasks())
def test_sums_are_those_of_int64(method: Method, case: tuple[Task, Int8Array]) -> None:
    """NumPy's int64 gives the same sums."""
    task, image = case
    if method.serves(task):
        sums = method.bind(task, CPU)(torch.from_numpy(image)).numpy().astype(np.int64) + method.offset(task)
        np.testing.assert_array_equal(sums, expected_sums(task, image))


@settings(max_examples=100, deadline=None)
@given(case=tasks())
def test_whatever_is_chosen_is_exact(case: tuple[Task, Int8Array]) -> None:
    """The rule finds a way for every task, in parts of the channels if need be."""
    task, image = case
    chosen = exact_sums(task, CPU, CPU_METHODS)
    sums = chosen(torch.from_numpy(image)).numpy().astype(np.int64) + chosen.offset
    np.testing.assert_array_equal(sums, expected_sums(task, image))
