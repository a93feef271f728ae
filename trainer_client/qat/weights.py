"""Which parameters and buffers the NPU does not have yet."""

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from trainer_client.npu.session import Session
from trainer_client.qat.capture import Captured


class PushedWeights:
    """What one session of an NPU holds, and what has changed since.

    A changed version counter is taken for a change. An unchanged one is no proof of the contrary:
    `tensor.data.add_()`, which older optimizers use, does not count. So a tensor whose counter stands still
    is compared with the snapshot of what was sent.

    Attributes:
        counters_tell: whether counters have told every change so far.
        are_early: whether no forward has asked for the last push.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self.counters_tell, self.are_early = True, False
        self._versions: dict[str, int] = {}
        self._sent: dict[str, Tensor] = {}
        names = set(captured.initializers)
        for tensor in onnx.load_model_from_string(captured.onnx).graph.initializer:
            if tensor.name in names:
                self._sent[tensor.name] = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))

    def push_changes(self, session: Session, only_counted: bool = False) -> bool:
        """Sends what the session does not hold yet, and tells whether that was anything.

        Args:
            session: the session.
            only_counted: leave what a version counter does not tell to the next push.

        Raises:
            NpuError: see `Session.push_weights`; nothing counts as sent then.
        """
        versions: dict[str, int] = {}
        changed: dict[str, Tensor] = {}
        for name in self._captured.initializers:
            live = self._captured.tensor(name).detach()
            versions[name] = live._version
            if self._differs(name, live, only_counted):
                # A copy: the optimizer changes the tensor in place while this one may still be on its way.
                changed[name] = torch.empty(live.shape, dtype=torch.float32).copy_(live)
        if changed:
            session.push_weights({name: tensor.numpy() for name, tensor in changed.items()})
        self._sent.update(changed)
        self._versions = versions
        return bool(changed)

    def forget(self) -> None:
        """After an error it is unknown what the session holds: the next push sends everything."""
        self._sent.clear()
        self._versions.clear()

    def _differs(self, name: str, live: Tensor, only_counted: bool) -> bool:
        sent = self._sent.get(name)
        if (
            sent is None
            or sent.shape != live.shape
            or self._versions.get(name, live._version) != live._version
        ):
            return True
        return not only_counted and not torch.equal(live, sent.to(live.device))
