"""A trace of both passes in Chrome's format: when the NPU ran each layer, when it arrived, when FP32 ran.

Open the file in chrome://tracing or Perfetto. Format: "Trace Event Format", JSON object form; times in
microseconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer_client.npu.session import LayerTiming

NPU, WIRE, FP32 = "NPU", "wire", "FP32"
_PROCESS_IDS = {NPU: 1, WIRE: 2, FP32: 3}


@dataclass(frozen=True)
class Fp32Timing:
    """When the client worked on one layer, in nanoseconds of `time.monotonic_ns()`.

    Attributes:
        layer: position in the layer map.
        start_ns: FP32 work for the layer began.
        end_ns: the FP32 value was there.
        tensor_ns: the NPU's tensor was there as well (its wait is over).
        injected_ns: the injection was done.
    """

    layer: int
    start_ns: int
    end_ns: int
    tensor_ns: int
    injected_ns: int


@dataclass(frozen=True)
class Overlap:
    """How much of the NPU's work ran beside FP32 work of the same batch.

    Attributes:
        npu_ms: time that the NPU worked.
        hidden_ms: the part of it during which an FP32 layer ran.
        fp32_layers: FP32 layers traced.
        fp32_layers_beside_npu: those that ran while the NPU worked on a later layer of the same batch.
    """

    npu_ms: float
    hidden_ms: float
    fp32_layers: int
    fp32_layers_beside_npu: int

    @property
    def hidden_share(self) -> float:
        """hidden_ms / npu_ms, in [0, 1]; 0 for an empty trace."""
        return self.hidden_ms / self.npu_ms if self.npu_ms else 0.0


class Trace:
    """Collects spans in memory; writes the file on `close()` or at the end of a `with` block."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
            for name, pid in _PROCESS_IDS.items()
        ]

    def add_batch(
        self,
        batch_id: int,
        names: Sequence[str],
        npu: Sequence[LayerTiming],
        fp32: Sequence[Fp32Timing],
    ) -> None:
        """Adds one batch.

        Args:
            batch_id: number of the batch.
            names: ONNX value name of each layer of the layer map.
            npu: timings of the tensors that arrived.
            fp32: timings of the client's layers.
        """
        for timing in npu:
            name = names[timing.layer]
            self._span(NPU, name, timing.npu_start_ns, timing.npu_end_ns, batch_id)
            self._events.append(
                {
                    **_event(WIRE, name, timing.arrival_ns, batch_id),
                    "ph": "i",
                    "s": "t",
                }
            )
        for work in fp32:
            name = names[work.layer]
            self._span(FP32, name, work.start_ns, work.end_ns, batch_id)
            self._span(FP32, "wait", work.end_ns, work.tensor_ns, batch_id)
            self._span(FP32, "inject", work.tensor_ns, work.injected_ns, batch_id)

    @property
    def document(self) -> Mapping[str, Any]:
        """The trace as the file will hold it."""
        return {"displayTimeUnit": "ms", "traceEvents": self._events}

    def close(self) -> None:
        """Writes the file; may be called again after more batches."""
        self._path.write_text(json.dumps(self.document))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _span(self, process: str, name: str, start_ns: int, end_ns: int, batch_id: int) -> None:
        self._events.append(
            {**_event(process, name, start_ns, batch_id), "ph": "X", "dur": (end_ns - start_ns) / 1000}
        )


def overlap(document: Mapping[str, Any]) -> Overlap:
    """What a trace says about the two passes running side by side.

    Args:
        document: a trace, as `Trace.document` or `json.load` of its file gives it.
    """
    npu, fp32 = _spans(document, NPU), _spans(document, FP32)
    npu_us = hidden_us = 0.0
    layers = beside = 0
    for batch_id, npu_spans in npu.items():
        order = {name: position for position, (name, _, _) in enumerate(npu_spans)}
        fp32_spans = [span for span in fp32.get(batch_id, []) if span[0] not in ("wait", "inject")]
        layers += len(fp32_spans)
        for name, start, end in fp32_spans:
            # FP32 spans of a batch follow one another, so their intersections never count a moment twice.
            shared_us = [max(0.0, min(end, n_end) - max(start, n_start)) for _, n_start, n_end in npu_spans]
            hidden_us += sum(shared_us)
            beside += any(shared_us[order.get(name, len(order)) + 1 :])
        npu_us += sum(end - start for _, start, end in npu_spans)
    return Overlap(npu_us / 1000, hidden_us / 1000, layers, beside)


def _event(process: str, name: str, start_ns: int, batch_id: int) -> dict[str, Any]:
    return {
        "name": name,
        "pid": _PROCESS_IDS[process],
        "tid": 0,
        "ts": start_ns / 1000,
        "args": {"batch": batch_id},
    }


def _spans(document: Mapping[str, Any], process: str) -> dict[int, list[tuple[str, float, float]]]:
    spans: dict[int, list[tuple[str, float, float]]] = {}
    for event in document["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == _PROCESS_IDS[process]:
            span = (event["name"], event["ts"], event["ts"] + event["dur"])
            spans.setdefault(event["args"]["batch"], []).append(span)
    return spans
