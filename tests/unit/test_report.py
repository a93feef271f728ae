import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest

from npu_wire.device import Capabilities, Fingerprint
from npu_wire.host_share import HostLayer, HostShare
from trainer_client.commands.charts import sqnr_by_layer
from trainer_client.commands.report import verdict, write_report
from trainer_client.commands.results import FP32, NPU, PTQ, TORCHAO, Cell, Results

RECIPE = {"steps": 5, "batch_size": 8, "lr": 0.001, "kind": "adam-cosine", "weight_decay": 0.0}
SETUP = {
    "model": "package:<net>",
    "dataset": "digits",
    "train_images": 1097,
    "test_images": 700,
    "parameters": 28042,
    "fp32": RECIPE,
    "finetune": RECIPE,
    "calibration_images": 64,
    "threads": 1,
    "versions": {"torch": "2.13.0"},
}


HOST = HostShare((HostLayer("h", "LSTM", "node 'l' (LSTM): no such <operator>", 75),), 4, 75, 300, 1234)


def results(ours: float = 98.0, host: HostShare | None = None) -> Results:
    """A finished comparison on one NPU."""
    npu = Capabilities(Fingerprint("emulator", "v", "m", "1", "acc16", "aa"), ("Conv",), 64)
    cells = []
    for seed in (0, 1):
        cells += [
            Cell(FP32, seed, 98.5, 1.0),
            Cell(PTQ, seed, 60.0 + seed, 1.0, "acc16", "aa", sqnr_db={"relu": 10.0 + 2 * seed, "flat": None}),
            Cell(TORCHAO, seed, 52.0, 1.0, "acc16", "aa", simulated_accuracy=98.5),
            Cell(NPU, seed, ours, 1.0, "acc16", "aa", sqnr_db={"relu": 30.0, "flat": None}, host=host),
        ]
    return Results(SETUP, (npu,), tuple(cells), "npu-trainer compare --model 'package:<net>'")


class Page(HTMLParser):
    """Collects text and every address that a page would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.addresses: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_holds_the_numbers_and_loads_nothing(tmp_path: Path) -> None:
    """The page tells the table, the gap of the simulation and the command, and refers to itself only."""
    page = Page(write_report(results(), tmp_path))
    assert all(address.startswith("#") for address in page.addresses)
    for expected in ("60.5 ± 0.7", "98.0 ± 0.0", "-46.5", "--model 'package:<net>'", "28,042 parameters"):
        assert expected in page.text


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        (98.5, "98.5 % on acc16: 38.0 points above min-max PTQ, level with FP32."),
        (50.0, "50.0 % on acc16: 10.5 points below min-max PTQ, 48.5 points below FP32."),
    ],
)
def test_verdict_is_honest(ours: float, sentence: str) -> None:
    """The sentence tells a lost comparison as plainly as a won one."""
    assert verdict(results(ours), "acc16") == f"NPU in the loop reaches {sentence}"


def test_report_of_an_unfinished_run(tmp_path: Path) -> None:
    """A run that was stopped after its first cells has a report that says so."""
    started = dataclasses.replace(results(), cells=results().cells[:2])
    assert "Not finished" in Page(write_report(started, tmp_path)).text


def test_report_tells_what_the_host_computes(tmp_path: Path) -> None:
    """Layers on either side, share of the work, bytes across, and every reason; or that there is none."""
    text = Page(write_report(results(host=HOST), tmp_path)).text
    assert "acc163125.0%1,234" in text  # 3 layers on the NPU, 1 on its host
    assert "host float: bits are the runtime's, not the chip's" in text
    assert "acc16hLSTMnode 'l' (LSTM): no such <operator>" in text
    alone = Page(write_report(results(host=dataclasses.replace(HOST, layers=())), tmp_path)).text
    assert "The NPU computes every layer." in alone
    assert "host float" not in alone


def test_sqnr_is_averaged_over_seeds() -> None:
    """10 and 12 dB make 11; a layer that has no finite value is left out."""
    assert sqnr_by_layer(results(), PTQ, "acc16") == {"relu": 11.0}
