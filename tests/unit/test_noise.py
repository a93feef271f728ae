"""Noise statistics add up."""

import math

import pytest

from trainer_client.qat.noise import LayerNoise, NoiseReport


def test_layer_noise_of_a_whole_is_the_sum_of_its_parts() -> None:
    """Energies and counts add, the largest noise is the larger one: 1000 over 10 is 20 dB."""
    whole = LayerNoise(10, 400.0, 3.0, 5.0, 2.0, 1, 0) + LayerNoise(30, 600.0, 7.0, 15.0, 1.5, 3, 4)
    assert whole == LayerNoise(40, 1000.0, 10.0, 20.0, 2.0, 4, 4)
    assert whole.sqnr_db == pytest.approx(20.0)
    assert whole.mean_noise_lsb == 0.5
    assert whole.masked_share == 0.1
    assert whole.saturated_share == 0.1


@pytest.mark.parametrize(
    ("signal", "noise", "expected"), [(1.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (1.0, 1.0, 0.0)]
)
def test_sqnr_at_its_limits(signal: float, noise: float, expected: float) -> None:
    """Without noise the ratio is infinite, without signal minus infinite."""
    assert LayerNoise(1, signal, noise, 0.0, 0.0, 0, 0).sqnr_db == expected


def test_sqnr_of_nothing_is_nan() -> None:
    """Neither signal nor noise: there is no ratio."""
    assert math.isnan(LayerNoise(1, 0.0, 0.0, 0.0, 0.0, 0, 0).sqnr_db)


def test_reports_join_layers_by_name() -> None:
    """Steps and counts add, and a layer that only one report knows is kept."""
    a, b = LayerNoise(1, 1.0, 1.0, 1.0, 1.0, 0, 0), LayerNoise(2, 2.0, 2.0, 2.0, 2.0, 0, 0)
    joined = NoiseReport(1, {"x": a}, fresh=1, without_noise=2) + NoiseReport(1, {"x": a, "y": b}, fresh=2)
    assert joined == NoiseReport(2, {"x": a + a, "y": b}, fresh=3, without_noise=2)


def test_a_report_prints_as_a_table() -> None:
    """Hand-computed: 20 dB, 20 / 40 LSB, 4 of 40 clipped, and 2 of 40 masked but not clipped."""
    report = NoiseReport(
        2, {"getitem_3": LayerNoise(40, 1000.0, 10.0, 20.0, 7.0, 6, 4)}, modules={"getitem_3": "body.norm"}
    )
    title, head, row = str(report).splitlines()
    assert title == "noise of 2 training steps"
    assert head.split("  ")[0].strip() == "module"
    assert row.split() == ["body.norm", "getitem_3", "20.0", "0.50", "7.0", "10.00", "5.00"]
    assert len(head) == len(row)
