"""How much of a network the NPU's host computes in float, where bits are the runtime's, not the chip's."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npu_wire.layer_map import LayerMap, RawSpec

HOST_FLOAT = "host float: bits are the runtime's, not the chip's"


@dataclass(frozen=True)
class HostLayer:
    """A layer that is host float.

    Attributes:
        name: ONNX value name.
        op: its operators, "Gather+LSTM".
        reason: why the NPU does not compute it.
        macs: multiply-accumulates.
    """

    name: str
    op: str
    reason: str
    macs: int


@dataclass(frozen=True)
class HostShare:
    """What lies on the host, of one compiled network; counts for one sample.

    Attributes:
        layers: those that are host float.
        of_layers: how many layers the network has.
        macs: multiply-accumulates on the host.
        of_macs: multiply-accumulates in all.
        bytes_across: bytes that cross between NPU and host: codes that one computes and the other reads, and
            raw inputs.
        note: what to think of it, for whoever reads the numbers in a file.
    """

    layers: tuple[HostLayer, ...]
    of_layers: int
    macs: int
    of_macs: int
    bytes_across: int
    note: str = HOST_FLOAT

    @property
    def macs_share(self) -> float:
        """Share of the multiply-accumulates, in [0, 1]."""
        return self.macs / self.of_macs if self.of_macs else 0.0

    def __str__(self) -> str:
        """The share in one line; for each operator on the host another, with how often and why."""
        if not self.layers:
            return f"all {self.of_layers} layers are computed by the NPU"
        lines = [
            f"{len(self.layers)} of {self.of_layers} layers, {self.macs_share:.1%} of multiply-accumulates "
            f"and {self.bytes_across:,} bytes a sample across are {self.note}"
        ]
        counts = Counter(layer.op for layer in self.layers)
        first = {layer.op: layer for layer in reversed(self.layers)}
        return "\n".join([*lines, *(f"  {n} {op}: {first[op].reason}" for op, n in counts.items())])


def host_share_from(document: Mapping[str, Any]) -> HostShare:
    """Reads what `dataclasses.asdict` wrote."""
    layers = tuple(HostLayer(**layer) for layer in document["layers"])
    return HostShare(**{**document, "layers": layers})


def host_share(layer_map: LayerMap) -> HostShare:
    """The share of the host, from the layer map alone."""
    host = [layer for layer in layer_map.layers if layer.host_float]
    names = {layer.name for layer in host}
    crossing: dict[tuple[str, bool], int] = {}
    raw = {spec.name: spec for spec in layer_map.inputs if isinstance(spec, RawSpec)}
    for layer in layer_map.layers:
        for name in layer.inputs:
            if name in raw:
                crossing[name, True] = math.prod(raw[name].shape) * raw[name].dtype.itemsize
            elif (name in names) != layer.host_float:
                crossing[name, layer.host_float] = math.prod(layer_map.tensors[name].shape)
    return HostShare(
        tuple(HostLayer(layer.name, layer.op, layer.host_reason, layer.macs) for layer in host),
        len(layer_map.layers),
        sum(layer.macs for layer in host),
        sum(layer.macs for layer in layer_map.layers),
        sum(crossing.values()),
    )
