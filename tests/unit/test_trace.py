"""The trace file and what it says about overlap."""

import json
from pathlib import Path

from trainer_client.npu.session import LayerTiming
from trainer_client.qat.trace import Fp32Timing, Overlap, Trace, overlap

MS = 1_000_000
NAMES = ["conv", "linear"]
# NPU: conv 0-4, linear 4-10. FP32: conv 2-6 (no wait, injects to 7), linear 7-12 (no wait, injects to 13).
NPU = [LayerTiming(0, 0, 4 * MS, 5 * MS), LayerTiming(1, 4 * MS, 10 * MS, 11 * MS)]
FP32 = [Fp32Timing(0, 2 * MS, 6 * MS, 6 * MS, 7 * MS), Fp32Timing(1, 7 * MS, 12 * MS, 12 * MS, 13 * MS)]


def test_overlap_by_hand(tmp_path: Path) -> None:
    """FP32 works during 2-6 and 7-10 of the NPU's 0-10: 7 ms; FP32 conv and NPU linear share 4-6."""
    trace = Trace(tmp_path / "trace.json")
    trace.add_batch(1, NAMES, NPU, FP32)
    assert overlap(trace.document) == Overlap(10.0, 7.0, 2, 1)
    assert overlap(trace.document).hidden_share == 0.7


def test_batches_do_not_overlap_each_other(tmp_path: Path) -> None:
    """FP32 work on one batch does not hide NPU work on another."""
    trace = Trace(tmp_path / "trace.json")
    trace.add_batch(1, NAMES, NPU, [])
    trace.add_batch(2, NAMES, [LayerTiming(0, 20 * MS, 21 * MS, 21 * MS)], FP32)
    assert overlap(trace.document) == Overlap(11.0, 0.0, 2, 0)


def test_file_is_chrome_trace_json(tmp_path: Path) -> None:
    """Complete events with microseconds, an instant event a tensor's arrival, named processes."""
    with Trace(tmp_path / "trace.json") as trace:
        trace.add_batch(7, NAMES, NPU, FP32)
    document = json.loads((tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(processes.values()) == {"NPU", "wire", "FP32"}
    npu = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and processes[e["pid"]] == "NPU"]
    assert npu == [("conv", 0.0, 4000.0), ("linear", 4000.0, 6000.0)]
    arrivals = [(e["name"], e["ts"]) for e in events if e["ph"] == "i" and processes[e["pid"]] == "wire"]
    assert arrivals == [("conv", 5000.0), ("linear", 11000.0)]
    assert {e["args"]["batch"] for e in events if e["ph"] != "M"} == {7}
