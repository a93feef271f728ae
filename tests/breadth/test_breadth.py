"""Networks of the breadth table run in the loop; the whole table is `make breadth`."""

import pytest

from .children import outcomes
from .examine import Outcome
from .networks import find

NETWORKS = [
    "ViTForImageClassification",
    "TCN",
    "mobilenetv3_small_minimal_100",
    "MobileNetV1ForImageClassification",
    "BertForSequenceClassification",
    "LSTM, bidirectional",
    "detector, three outputs",
    "ConvNextForImageClassification",
    "PoolFormerForImageClassification",
    "PvtV2ForImageClassification",
    "TextNetForImageClassification",
    "mixnet_s",
]


def _examined(names: list[str]) -> list[Outcome]:
    for package in ("transformers", "geffnet"):
        pytest.importorskip(package)
    return list(outcomes([find(name) for name in names]))


def _wrong(found: list[Outcome]) -> list[str]:
    """Names of networks that do not run as they should, with the reason."""
    return [
        f"{o.name}: {o.status} {o.reason} {o.mismatches} {o.unequal_outputs} {o.bad_gradients}"
        for o in found
        if not (o.good and o.elements and o.outputs and o.gradients)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_networks_of_many_families_run() -> None:
    """Both backends agree, evaluation is the training forward bit for bit, every gradient is there."""
    assert _wrong(_examined(NETWORKS)) == []


def test_what_ends_a_process_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is not done in time is told as such, and the next one is examined."""
    monkeypatch.setattr("breadth.children.TIME_LIMIT_S", 0.01)
    found = list(outcomes([find("TCN"), find("MLP-Mixer")]))
    assert [(o.name, o.status) for o in found] == [("TCN", "no time"), ("MLP-Mixer", "no time")]
