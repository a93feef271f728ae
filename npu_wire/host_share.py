"""How much of a network the NPU's host computes in float, where bits are the runtime's, not the chip's."""

import math
from dataclasses import dataclass

from npu_wire.layer_map import LayerMap, RawSpec


@dataclass(frozen=True)
class HostShare:
    """What lies on the host, of one compiled network; counts for one sample.

    Attributes:
        layers: names of the layers that are host float.
        of_layers: how many layers the network has.
        macs: multiply-accumulates on the host.
        of_macs: multiply-accumulates in all.
        bytes_across: bytes that cross between NPU and host: codes that one computes and the other reads, and
            raw inputs.
    """

    layers: tuple[str, ...]
    of_layers: int
    macs: int
    of_macs: int
    bytes_across: int

    def __str__(self) -> str:
        share = self.macs / self.of_macs if self.of_macs else 0.0
        return (
            "host float (bits are the runtime's, not the chip's): "
            f"{len(self.layers)} of {self.of_layers} layers, "
            f"{share:.1%} of multiply-accumulates, {self.bytes_across} bytes a sample between NPU and host"
        )


def host_share(layer_map: LayerMap) -> HostShare:
    """The share of the host, from the layer map alone."""
    host = {layer.name for layer in layer_map.layers if layer.host_float}
    crossing: dict[tuple[str, bool], int] = {}
    raw = {spec.name: spec for spec in layer_map.inputs if isinstance(spec, RawSpec)}
    for layer in layer_map.layers:
        for name in layer.inputs:
            if name in raw:
                crossing[name, True] = math.prod(raw[name].shape) * raw[name].dtype.itemsize
            elif (name in host) != layer.host_float:
                crossing[name, layer.host_float] = math.prod(layer_map.tensors[name].shape)
    return HostShare(
        tuple(layer.name for layer in layer_map.layers if layer.host_float),
        len(layer_map.layers),
        sum(layer.macs for layer in layer_map.layers if layer.host_float),
        sum(layer.macs for layer in layer_map.layers),
        sum(crossing.values()),
    )
