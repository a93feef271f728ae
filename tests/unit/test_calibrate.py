"""Ranges are what torch's own hooks see."""

import json
import math
import re
from typing import Any

import pytest
import torch
from small_nets import images, residual_net
from torch import Tensor, nn

from npu_wire.errors import InvalidInput, NonFiniteInput
from trainer_client.qat.calibrate import DEAD_RANGE, RangeRule, merge_ranges, observe
from trainer_client.qat.capture import Captured, capture


@pytest.fixture(scope="module")
def captured() -> Captured:
    """A captured residual net."""
    return capture(residual_net(), images(1))


def test_ranges_are_those_that_forward_hooks_see(captured: Captured) -> None:
    """Input, batch norm, ReLU6 and output over two batches, against hooks on the user's own modules."""
    net = captured.model.eval()
    batches = [images(4, seed=5), images(3, seed=6)]
    seen: dict[str, list[Tensor]] = {"stem_norm": [], "stem_act": [], "head": []}
    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: seen[name].append(o.detach())
        )
        for name in seen
    ]
    for batch in batches:
        net(batch)
    for hook in hooks:
        hook.remove()
    ranges = observe(captured, [(batch, "label") for batch in batches])
    names = {"stem_norm": "getitem", "stem_act": "hardtanh", "head": "linear"}
    for module, value in names.items():
        low = min(float(t.min()) for t in seen[module])
        high = max(float(t.max()) for t in seen[module])
        assert ranges[value] == pytest.approx((low, high), rel=1e-5, abs=1e-6)
    assert ranges["x"] == (min(float(b.min()) for b in batches), max(float(b.max()) for b in batches))


def test_ranges_of_parts_merge_to_the_ranges_of_the_whole(captured: Captured) -> None:
    """Two half calibrations, one of them through JSON, equal one whole calibration."""
    a, b = images(4, seed=5), images(4, seed=6)
    part = json.loads(json.dumps(observe(captured, b)))
    merged = merge_ranges(observe(captured, a), {name: (low, high) for name, (low, high) in part.items()})
    assert merged == observe(captured, [a, b])


def test_dead_and_constant_activations_get_a_width() -> None:
    """A ReLU that is always 0 is named in a warning and gets the documented range; constants extend to 0."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * 0.0 - 1.0) + torch.relu(x * 0.0 + 3.0)

    flat = capture(Flat(), torch.randn(2, 4))
    with pytest.warns(UserWarning, match="for all|over all") as warned:
        ranges = observe(flat, torch.randn(8, 4))
    dead, constant = (str(warning.message) for warning in warned)
    assert re.search(r"were 0 for all calibration data: .*relu", dead)
    assert re.search(r"did not change over all calibration data: .*relu_1", constant)
    assert ranges["relu"] == DEAD_RANGE
    assert ranges["relu_1"] == (0.0, 3.0)
    assert all(low < high for low, high in ranges.values())


def test_a_range_that_no_scale_can_hold_is_taken_for_dead() -> None:
    """1e-31 is a float32 number, but the scale of a product with it is none."""
    next_to_nothing = capture(nn.ReLU(), torch.zeros(2, 4))
    with pytest.warns(UserWarning, match="were 0 for all calibration data: input, relu"):
        ranges = observe(next_to_nothing, torch.full((2, 4), 1e-31))
    assert ranges == {"input": DEAD_RANGE, "relu": DEAD_RANGE}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_data_is_refused(captured: Captured, bad: float) -> None:
    """The message says which batch, and that it is the input."""
    broken = images(2)
    broken[1, 0, 0, 0] = bad
    with pytest.raises(NonFiniteInput, match="batch 1: the input"):
        observe(captured, [images(2), broken])


def test_data_of_another_kind_is_refused(captured: Captured) -> None:
    """No batch at all, another shape, another dtype, not a tensor: each says what was expected."""
    with pytest.raises(InvalidInput, match="no batch"):
        observe(captured, [])
    with pytest.raises(
        InvalidInput, match=r"shape \(2, 1, 8, 8\), expected torch.float32 of shape \(batch, 3"
    ):
        observe(captured, images(2)[:, :1])
    with pytest.raises(InvalidInput, match=r"torch.float64"):
        observe(captured, images(2).double())
    with pytest.raises(InvalidInput, match="is a str"):
        observe(captured, ["x"])


def test_an_input_named_like_a_builtin_keeps_its_onnx_name() -> None:
    """`nn.Sequential` calls its input `input`, which FX renames; ranges go by the name that ONNX keeps."""
    captured = capture(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.zeros(2, 1, 5, 5))
    assert next(iter(captured.inputs)) == "input"
    assert observe(captured, torch.tensor([-2.0, 3.0]).repeat(25).reshape(2, 1, 5, 5))["input"] == (-2.0, 3.0)


def test_an_expanded_parameter_is_no_activation(recwarn: pytest.WarningsRecorder) -> None:
    """A class token of zeros, as transformers begin with, is reported neither as a range nor as dead."""

    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1).flatten(1))

    x = torch.randn(5, 2, 4)
    ranges = observe(capture(WithToken(), x), x)
    assert not [str(w.message) for w in recwarn if "were 0 for all" in str(w.message)]
    low, high = float(x.min()), float(x.max())
    assert [name for name, bounds in ranges.items() if bounds == (low, high)] == ["x", "cat", "view"]
    assert len(ranges) == 4


def test_percentiles_clip_the_outliers_and_are_averaged_over_batches() -> None:
    """Of 0, 1 ... 1000 the 1st and the 99th percentile are 10 and 990; then of 0, 2 ... 2000."""
    captured = capture(nn.ReLU(), torch.zeros(2, 1001))
    steps = torch.arange(1001.0).reshape(1, -1)
    rule = RangeRule("percentile", percentile=99.0)
    assert observe(captured, steps, rule)["input"] == pytest.approx((10.0, 990.0))
    assert observe(captured, [steps, 2 * steps], rule)["input"] == pytest.approx((15.0, 1485.0))
    assert observe(captured, [steps, 2 * steps])["input"] == (0.0, 2000.0)
    rare = torch.zeros(1, 1001)
    rare[0, 5] = 3.0
    assert observe(captured, rare, rule)["input"] == (0.0, 3.0)


def test_a_moving_average_forgets() -> None:
    """Upper ends 1, 2, 4 with a momentum of 0.5: 1, then 1.5, then 2.75."""
    captured = capture(nn.ReLU(), torch.zeros(2, 2))
    batches = [torch.tensor([[0.0, end]]) for end in (1.0, 2.0, 4.0)]
    assert observe(captured, batches, RangeRule("ema", momentum=0.5))["input"] == (0.0, 2.75)


@pytest.mark.parametrize(
    "wrong", [{"method": "max"}, {"percentile": 100.0}, {"percentile": 50.0}, {"momentum": 0.0}]
)
def test_rules_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    """The message names the parameter."""
    with pytest.raises(InvalidInput, match=f"{next(iter(wrong))} is"):
        RangeRule(**wrong)
