"""Random and real networks: the compiler and the second opinion agree on every number."""

import pytest

from .comparison import JUDGES
from .jobs import judge_random, judge_real
from .real_networks import REAL


@pytest.mark.parametrize("name", JUDGES)
def test_random_networks_are_compiled_as_the_page_says(name: str) -> None:
    """Eight random networks: equal scales, zero points, weight and bias codes, and equal outputs."""
    for finding in judge_random(name, range(8)):
        assert finding.differences == (), finding.network
        assert finding.elements > 0


@pytest.mark.slow
@pytest.mark.parametrize("network", REAL)
def test_real_network_is_compiled_as_the_page_says(network: str) -> None:
    """An exported network, all layers chained, before every engine."""
    for finding in judge_real(network):
        assert finding.differences == (), finding.judge
        assert finding.layers > 10
