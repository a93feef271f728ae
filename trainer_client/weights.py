"""Which parameters and buffers the NPU does not have yet."""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from npu_wire.layer_map import Float32Array
from trainer_client.capture import Captured


class PushedWeights:
    """What one session of an NPU holds, and what has changed since.

    A changed version counter is proof of a change. An unchanged one is not: `tensor.data.add_()`, which older
    optimizers use, does not count. So a tensor whose counter stands still is compared with the snapshot of
    what was sent; that costs a pass over the weights only in steps that do not train them.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._versions: dict[str, int] = {}
        self._sent: dict[str, Tensor] = {}
        names = set(captured.initializers)
        for tensor in onnx.load_model_from_string(captured.onnx).graph.initializer:
            if tensor.name in names:
                self._sent[tensor.name] = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))

    def take_changes(self) -> Mapping[str, Float32Array]:
        """Snapshots of what changed since the last call, by initializer name; they count as sent from now."""
        changes: dict[str, Float32Array] = {}
        for name in self._captured.initializers:
            live = self._captured.tensor(name).detach()
            sent = self._sent[name]
            counter_stands = self._versions.get(name) in (None, live._version)
            if counter_stands and live.shape == sent.shape and torch.equal(live, sent.to(live.device)):
                self._versions[name] = live._version
                continue
            # A copy: the optimizer changes the tensor in place while this one may still be on its way.
            snapshot = live.to("cpu", torch.float32, copy=True).contiguous()
            self._versions[name] = live._version
            self._sent[name] = snapshot
            changes[name] = snapshot.numpy()
        return changes
