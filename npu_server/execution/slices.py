"""How many samples of a layer are computed at a time, so that nobody waits long for the device."""

import math

from npu_server.compile.graph import AveragePool, HostFloat, HostPart, MaxPool
from npu_server.compile.planning.lowering import Layer
from npu_server.compile.planning.work import products
from npu_wire.layer_map import LayerMap

# Looking up or moving a code costs about as much as so many multiplications of a vectorized sum.
_PER_CODE = 128


def samples_at_once(layer: Layer, layer_map: LayerMap, work: int) -> int:
    """Samples of a layer, at least one.

    Args:
        layer: the layer.
        layer_map: of its program.
        work: multiplications that may be done at a time.
    """
    if isinstance(layer.operator, HostFloat | HostPart):
        return 2**31  # float sums may round otherwise where the array has another shape
    shapes = [layer_map.tensors[name].shape for name in layer.spec.inputs]
    codes = math.prod(layer.shape) + sum(map(math.prod, shapes))
    return max(1, work // (math.prod(layer.shape) * _products(layer, shapes[0]) + codes * _PER_CODE))


def _products(layer: Layer, shape: tuple[int, ...]) -> int:
    """Multiplications for one code of the output, or what takes as long."""
    if isinstance(layer.operator, MaxPool | AveragePool):
        return math.prod(layer.operator.window.size) * _PER_CODE
    return products(layer.operator, shape)
