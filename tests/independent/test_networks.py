"""Random and real networks: the compiler and the second opinion agree on every number."""

from pathlib import Path

import pytest

from .comparison import JUDGES
from .jobs import judge_random, judge_random_statically, judge_real
from .page import HEAD, STATIC
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
    assert sum(finding.codes for finding in findings) > 5_000
    assert sum(finding.off_biases for finding in findings) < sum(f.biases for f in findings) / 20


@pytest.mark.slow
@pytest.mark.parametrize("network", REAL)
def test_real_network_is_compiled_as_the_page_says(network: str) -> None:
    """An exported network, all layers chained, before every engine; and before `quantize_static`."""
    findings = judge_real(network)
    assert [finding.differences for finding in findings] == [()] * (len(JUDGES) + 1)


def test_page_is_of_this_harness() -> None:
    """docs/conformance-independent.md has its words, a row for each engine and network, and no difference."""
    page = (Path(__file__).parents[2] / "docs" / "conformance-independent.md").read_text("utf-8")
    assert page.startswith(HEAD.format(differences="**Nothing differs.**"))
    assert page.endswith(STATIC.partition("{rows}")[2])
    for network in ("random networks", *REAL):
        assert page.count(f"\n| {network} | ") == len(JUDGES) + 1
