"""Random and real networks: the compiler and the second opinion agree on every number."""

import pytest

from .comparison import JUDGES
from .jobs import judge_random, judge_random_statically, judge_real
from .real_networks import REAL


@pytest.mark.parametrize("name", JUDGES)
def test_random_networks_are_compiled_as_the_page_says(name: str) -> None:
    """Eight random networks: equal scales, zero points, weight and bias codes, and equal outputs."""
    for finding in judge_random(name, range(8)):
        assert finding.differences == (), finding.network
        assert finding.elements > 0


def test_numbers_are_those_of_quantize_static() -> None:
    """Scales, zero points, weight and bias codes are those of ONNX Runtime's own quantizer."""
    findings = judge_random_statically(range(8))
    assert [finding.differences for finding in findings] == [()] * 8
    assert sum(finding.codes for finding in findings) > 10_000
    assert sum(finding.off_biases for finding in findings) < sum(f.biases for f in findings) / 20


@pytest.mark.slow
@pytest.mark.parametrize("network", REAL)
def test_real_network_is_compiled_as_the_page_says(network: str) -> None:
    """An exported network, all layers chained, before every engine; and before `quantize_static`."""
    findings = judge_real(network)
    assert [finding.differences for finding in findings] == [()] * (len(JUDGES) + 1)
