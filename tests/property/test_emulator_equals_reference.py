"""The emulator and the specification never differ in a bit.

It says most where each has code of its own: sums and requantization of convolutions and matrix products,
pools, moves. The compiler, functions of one and two tensors, what becomes of a mean's sum and what the host
computes are one for both (`tests/architectures/side_by_side.py`): of these only engines can be the judges.
"""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_nets import Net, nets

from npu_server.backends.emulator import EmulatorBackend, kernels, native
from npu_server.backends.emulator.bounds import largest_sum
from npu_server.backends.reference import ReferenceBackend
from npu_server.numerics.profile import list_profiles
from npu_server.seam import BackendOptions


@pytest.mark.parametrize("profile", list_profiles())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    net=nets(),
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 3),
    tabled=st.sampled_from([1, 256]),
    levels=st.sampled_from([(), *((level,) for level in native.levels())]),
)
def test_every_tensor_is_equal(
    profile: str, net: Net, seed: int, size: int, tabled: int, levels: tuple[native.Level, ...]
) -> None:
    """On random networks every layer's output is equal, element by element.

    Convolutions by torch and by each set of native kernels, pairs by table and without.
    """
    batch = np.random.default_rng(seed).integers(-128, 128, (size, *net.shape)).astype(np.int8)
    options = BackendOptions(profile=profile)
    with mock.patch.object(kernels, "_TABLE_ELEMENTS", tabled):
        backends = (ReferenceBackend(options), EmulatorBackend(options, levels=levels))
        programs = [backend.compile(net.model, net.ranges) for backend in backends]
    taps = range(len(programs[0].layer_map.layers))
    for expected, actual in zip(
        *(filter(None, p.forward(p.layer_map.named(batch), taps)) for p in programs), strict=True
    ):
        spec = programs[0].layer_map.layers[expected.layer]
        np.testing.assert_array_equal(actual.data, expected.data, err_msg=f"{spec.op} {spec.name}")


@given(
    seed=st.integers(0, 2**32 - 1),
    zero_point=st.integers(-128, 127),
    size=st.integers(1, 64),
    one_sided=st.booleans(),
)
def test_bound_holds_for_the_worst_input(seed: int, zero_point: int, size: int, one_sided: bool) -> None:
    """No input's partial sum, in any order, exceeds the bound behind float32; the worst one reaches it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0 if one_sided else -127, 128, (3, size)).astype(np.int8)
    ends = np.array([-128 - zero_point, 127 - zero_point])
    products = ends[:, None, None] * codes.astype(np.int64)
    largest = max(
        np.clip(products.max(axis=0), 0, None).sum(axis=1).max(),
        -products.min(axis=0).clip(None, 0).sum(axis=1).min(),
    )
    assert largest_sum(codes, zero_point) == largest


def test_torch_and_numba_requantize_alike() -> None:
    """The GPU's formula and the CPU's kernel agree, ties and saturation included."""
    from npu_server.backends.emulator.packing import Requantizer
    from npu_server.backends.emulator.requantize import requantize, requantize_torch

    generator = torch.Generator().manual_seed(5)
    sums = torch.randint(-(2**23), 2**23, (4096, 16), generator=generator).to(torch.float32)
    kinds = ((True, torch.float32), (False, torch.float32), (False, torch.float64))
    for fixed_point, kind in kinds:
        for wraps in (True, False):
            for bits in (16, 24, 32):
                shift = torch.arange(31, 47)
                half = torch.ones(16, dtype=torch.int64) << (shift - 1)
                requantizer = Requantizer(
                    fixed_point=fixed_point,
                    bias=torch.arange(-8, 8) * 1000,
                    mantissa=torch.full((16,), 1 << 30),
                    shift=shift,
                    nudge_positive=half + (1 << 30),
                    nudge_negative=half - (1 << 30),
                    factor=2.0 ** -torch.arange(1, 17).to(kind),
                    accumulator_bits=bits,
                    wraps=wraps,
                    zero_point=3,
                    low=-128,
                    high=127,
                )
                assert torch.equal(requantize(sums, requantizer), requantize_torch(sums, requantizer))
