"""What `print(qat)` tells: which layers the NPU computes, and which its host."""

from collections import Counter

from npu_wire.device import Capabilities
from npu_wire.host_share import host_share
from npu_wire.layer_map import LayerMap


def summary(model: str, npu: Capabilities, layer_map: LayerMap | None) -> str:
    """Some lines on a model in the loop.

    Args:
        model: name of the user's class.
        npu: the NPU.
        layer_map: of the compiled model; None: it is not compiled yet.
    """
    title = f"{model} in the loop with {npu.profile} ({npu.fingerprint.backend})"
    if layer_map is None:
        return f"{title}, not compiled yet: call calibrate(loader)"
    macs = sum(layer.macs for layer in layer_map.layers)
    counts = Counter(layer.op for layer in layer_map.layers if not layer.host_float)
    return "\n".join(
        [
            f"{title}: {len(layer_map.layers)} layers, {macs:,} multiply-accumulates a sample",
            f"NPU: {', '.join(f'{n} {op}' for op, n in counts.most_common()) or 'no layer'}",
            str(host_share(layer_map)),
        ]
    )
