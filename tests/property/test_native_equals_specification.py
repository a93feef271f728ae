"""Native kernels against the specification's own steps: int64 sums, the register, the requantization."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_emulator_sums import tasks

from npu_server.backends.emulator.native import Level, bind, levels
from npu_server.backends.emulator.selftest import expected_sums
from npu_server.backends.emulator.sums import Task
from npu_server.numerics.profile import Profile, list_profiles, load_profile
from npu_server.numerics.requantize import Output, accumulate, make_multiplier, requantize
from npu_server.numerics.rules import AccumulatorRule, RequantizeRule
from npu_wire.layer_map import Int8Array

PROFILES = [load_profile(name) for name in list_profiles()]


@st.composite
def rules(draw, profile: Profile) -> RequantizeRule:
    """Those of a profile's layers, and roundings that no shipped profile has."""
    own = [profile.requantize, profile.requantize_in("grouped"), profile.requantize_in("fully_connected")]
    kind, steps = draw(st.sampled_from([("q31", 1), ("q31", 2), ("power_of_two", 1)]))
    other = RequantizeRule(kind, draw(st.sampled_from(["half_away", "half_up", "floor"])), steps)
    return draw(st.sampled_from([*own, other]))


@pytest.mark.parametrize("level", levels(), ids=lambda level: level.name)
@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
@settings(max_examples=25, deadline=None)
@given(case=tasks(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_codes_are_those_of_the_specification(
    profile: Profile, level: Level, case: tuple[Task, Int8Array], seed: int, data: st.DataObject
) -> None:
    """Any window, channels, groups, zero points, ratios from next to nothing to 2^20, registers, clamps."""
    (task, image), rng = case, np.random.default_rng(seed)
    rule = data.draw(rules(profile))
    narrow = AccumulatorRule(
        data.draw(st.integers(8, 32)), data.draw(st.sampled_from(["saturate", "wrap"])), "sum"
    )
    register = data.draw(st.sampled_from([profile.accumulator, narrow]))
    if register.where == "every_mac":
        register = AccumulatorRule(register.bits, register.overflow, "sum")
    sums = expected_sums(task, image)
    limit = 1 << (register.bits - 1)
    bias = rng.integers(-min(limit, 50_000), min(limit, 50_000), len(task.codes))
    size = max(1, min(limit, int(np.abs(sums + bias).max())))
    spread = data.draw(st.sampled_from([2.0, 12.0, 40.0]))
    ratio = np.minimum(100 / size * 2.0 ** rng.uniform(-spread, min(spread, 20.0), len(bias)), 2.0**29)
    if data.draw(st.booleans()):
        ratio = 2.0 ** np.rint(np.log2(ratio))
    low, high = sorted(data.draw(st.tuples(st.integers(-128, 127), st.integers(-128, 127))))
    clamp = data.draw(st.sampled_from([(-128, 127), (low, high)]))
    multiplier, output = make_multiplier(ratio, 1.0, rule), Output(data.draw(st.integers(-128, 127)), *clamp)
    layer = bind(level, task, bias, multiplier, register, output)
    if layer is not None:
        expected = requantize(accumulate(sums + bias, register), multiplier, output)
        np.testing.assert_array_equal(layer(torch.from_numpy(image)).numpy(), expected)
