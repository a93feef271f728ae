"""The injected value is the NPU's, bit for bit; the gradient passes where hand and torch say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npu_wire.layer_map import Int8Array
from npu_wire.quantize import dequantize
from trainer_client.qat.inject import InjectionRule, _inject_torch, inject

SHAPES = [(2, 5, 3, 7), (1, 1, 1, 1), (3, 4), (2, 6, 9), (4, 8, 1, 1), (2, 3, 40, 40)]


def _case(shape: tuple[int, ...], seed: int, rule: InjectionRule) -> tuple[Tensor, Int8Array, Tensor]:
    """FP32 values that lie around the codes' values, some far off; the codes; an upstream gradient."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-128, 128, shape).astype(np.int8)
    off = rng.normal(0, 2.5, shape) * rule.scale
    y = torch.from_numpy((dequantize(q, rule.scale, rule.zero_point) + off).astype(np.float32))
    return y, q, torch.from_numpy(rng.normal(size=shape).astype(np.float32))


# FP32 value, code, whether the gradient passes: each worked out by hand. Scales are powers of two, so that
# the limit of 3 LSB is met exactly.
BY_HAND = {
    "real = q / 2": (
        InjectionRule(0.5, 0),
        [
            (1.0, 2, True),
            (2.25, 4, True),  # half an LSB off
            (3.5, 4, True),  # 3 LSB, not more
            (0.5, 4, True),
            (3.75, 4, False),  # 3.5 LSB
            (0.25, 4, False),
            (63.0, 126, True),
            (63.5, 127, False),  # the last code may be a clipped one
            (-63.5, -127, True),
            (-64.0, -128, False),
            (math.nan, 4, False),
            (math.inf, 4, False),
        ],
    ),
    "real = (q + 128) / 4, ReLU": (
        InjectionRule(0.25, -128, -129, 128, lower=0.0),  # the activation bounds the codes: none is clipped
        [
            (5.0, -108, True),
            (0.25, -128, True),
            (0.0, -128, False),  # ReLU's own gradient at 0
            (-3.0, -128, False),  # both say 0, but ReLU is flat
            (-1.0, -120, False),
            (63.75, 127, True),
            (66.0, 127, False),  # 9 LSB: the accumulator saturated
        ],
    ),
    "real = (q + 128) / 16, ReLU6": (
        InjectionRule(0.0625, -128, -129, 128, lower=0.0, upper=6.0),
        [
            (3.0, -80, True),
            (5.9375, -33, True),
            (5.8125, -32, True),  # 3 LSB from 6
            (5.75, -32, False),
            (6.0, -32, False),  # ReLU6's own gradient at 6
            (9.0, -32, False),
            (-0.5, -128, False),
        ],
    ),
    "real = (q - 5) / 64, hard tanh": (
        InjectionRule(2.0**-6, 5, lower=-1.0, upper=1.0),
        [
            (0.5, 37, True),
            (0.5, 41, False),
            (1.0, 69, False),
            (2.0, 69, False),
            (-1.0, -59, False),
            (-0.984375, -58, True),
        ],
    ),
    "real = q, clipped from -100 on": (
        InjectionRule(1.0, 0, -100, 127),
        [(-99.0, -99, True), (-100.0, -100, False), (-105.0, -105, False)],
    ),
}


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(BY_HAND)),
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    channels_last=st.booleans(),
    codes_channels_last=st.booleans(),
    overwrite=st.booleans(),
)
def test_gradient_by_hand(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    channels_last: bool,
    codes_channels_last: bool,
    overwrite: bool,
) -> None:
    """Tensors of cases whose gradient is known, in any memory order of either side."""
    rule, cases = BY_HAND[name]
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(cases), size=shape)
    y = torch.from_numpy(np.array([case[0] for case in cases], np.float32)[chosen])
    q = np.array([case[1] for case in cases], np.int8)[chosen]
    passes = torch.from_numpy(np.array([case[2] for case in cases])[chosen])
    upstream = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    if channels_last and len(shape) == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    if codes_channels_last and len(shape) == 4:
        q = np.ascontiguousarray(q.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    leaf = y.clone().requires_grad_()
    out, _ = inject(leaf * 1.0, q, rule, overwrite)  # a product is what may be overwritten
    out.backward(upstream)
    np.testing.assert_array_equal(out.detach().numpy(), dequantize(q, rule.scale, rule.zero_point))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[passes], upstream[passes])
    assert not leaf.grad[~passes].any()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 1000),
    scale=st.floats(2.0**-13, 8.0, width=32),
    zero_point=st.integers(-128, 127),
    beyond=st.floats(4.0, 100.0),
)
def test_an_npu_that_rounds_as_torch_is_torchs_fake_quantization(
    shape: tuple[int, ...], seed: int, scale: float, zero_point: int, beyond: float
) -> None:
    """Value and gradient are those of torch's own operator, within the range and 4 LSB or more beyond."""
    rng = np.random.default_rng(seed)
    lsb = rng.uniform(-127.4, 126.4, shape)
    lsb = np.where(lsb > 100, lsb + 27 + beyond, np.where(lsb < -100, lsb - 27 - beyond, lsb))
    y = torch.from_numpy(((lsb - zero_point) * scale).astype(np.float32))
    upstream = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    judged, leaf = y.clone().requires_grad_(), y.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(judged, scale, zero_point, -128, 127)
    codes = (expected.detach() / scale + zero_point).round().to(torch.int8).numpy()
    out, _ = inject(leaf * 1.0, codes, InjectionRule(scale, zero_point))
    torch.autograd.backward([expected, out], [upstream, upstream])
    assert torch.equal(out, expected)
    assert judged.grad is not None
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, judged.grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_path_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    """The path for other devices yields the same values, gradients and counts as the fused pass."""
    rule = InjectionRule(0.037, 11, -128, 127, 0.0, 6.0)
    y, q, upstream = _case(shape, 3, rule)
    fused_leaf, torch_leaf = y.clone().requires_grad_(), y.clone().requires_grad_()
    fused, fused_noise = inject(fused_leaf, q, rule)
    plain, plain_noise = _inject_torch(torch_leaf, torch.from_numpy(q), rule)
    torch.autograd.backward([fused, plain], [upstream, upstream])
    assert torch.equal(fused, plain)
    assert fused_leaf.grad is not None
    assert torch_leaf.grad is not None
    assert torch.equal(fused_leaf.grad, torch_leaf.grad)
    assert (fused_noise.masked, fused_noise.saturated) == (plain_noise.masked, plain_noise.saturated)
    assert fused_noise.noise_energy == pytest.approx(plain_noise.noise_energy, rel=1e-5)
    assert fused_noise.max_noise_lsb == pytest.approx(plain_noise.max_noise_lsb, rel=1e-6)


def test_statistics_by_hand() -> None:
    """Four elements, scale 1/2: one exact, one half an LSB off, one masked for its mismatch, one clipped."""
    y = torch.tensor([[1.0, 2.25, 9.0, 63.5]])
    q = np.array([[2, 4, 8, 127]], np.int8)
    _, noise = inject(y, q, InjectionRule(0.5, 0))
    assert noise.elements == 4
    assert noise.signal_energy == pytest.approx(1 + 2.25**2 + 81 + 63.5**2)
    assert noise.noise_energy == pytest.approx(0.25**2 + 25)
    assert noise.max_noise_lsb == 10.0
    assert noise.mean_noise_lsb == pytest.approx((0.5 + 10) / 4)
    assert noise.masked_share == 0.5
    assert noise.saturated_share == 0.25
    assert noise.sqnr_db == pytest.approx(10 * math.log10((1 + 2.25**2 + 81 + 63.5**2) / 25.0625))


def test_overwriting_what_a_backward_needs_is_an_error_not_a_wrong_gradient() -> None:
    """ReLU keeps its output for its backward; autograd refuses when it was written over."""
    leaf = torch.randn(4, 4, requires_grad=True)
    out, _ = inject(torch.relu(leaf), np.zeros((4, 4), np.int8), InjectionRule(1.0, 0), overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_strided_values_are_not_written_over() -> None:
    """A transposed value is injected into a copy; value and gradient are right."""
    leaf = torch.arange(12.0).reshape(3, 4).requires_grad_()
    q = np.arange(12, dtype=np.int8).reshape(3, 4).T
    out, _ = inject(leaf.t(), q, InjectionRule(1.0, 0), overwrite=True)
    out.sum().backward()
    assert torch.equal(out.detach(), torch.arange(12.0).reshape(3, 4).t())
    assert torch.equal(leaf.grad, torch.ones(3, 4))
    assert torch.equal(leaf.detach(), torch.arange(12.0).reshape(3, 4))


def test_nan_in_fp32_stops_its_own_gradient_only() -> None:
    """A NaN of the FP32 pass cannot reach the weights: the value is the NPU's, the gradient there is 0."""
    leaf = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    out, _ = inject(leaf * 1.0, np.array([[1, 1]], np.int8), InjectionRule(1.0, 0), overwrite=True)
    out.backward(torch.ones(1, 2))
    assert out.tolist() == [[1.0, 1.0]]
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0.0, 1.0]]
