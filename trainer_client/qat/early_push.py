"""Weights set out for the NPU as soon as the optimizer has written them, not only at the next forward."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class EarlyPush:
    """Calls a function once between two training forwards: when the last optimizer of the step has stepped.

    Which optimizers there are, and which of them steps last, is learned from the steps before: PyTorch tells
    of every optimizer's step. Nothing depends on it. Where an optimizer is not seen, steps in another thread
    or in another order, or where weights change afterwards, the next forward sends what is missing.

    Args:
        model: whose parameters count.
        push: sends what has changed; must not raise. Its object is held weakly.
    """

    def __init__(self, model: nn.Module, push: Callable[[], None]) -> None:
        self._model = model
        self._push = weakref.WeakMethod(push)
        self._last: weakref.ref[Optimizer] | None = None  # before the last forward
        self._latest: weakref.ref[Optimizer] | None = None  # since
        self._thread = 0
        self._is_due = False
        own = weakref.ref(self)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            watch = own()
            if watch is not None:
                watch._stepped(optimizer)

        handle = register_optimizer_step_post_hook(stepped)
        weakref.finalize(self, handle.remove)

    def forward_begins(self) -> None:
        """A training forward has its weights; the next ones come from the optimizers' next steps."""
        self._thread, self._is_due = threading.get_ident(), True
        self._last, self._latest = self._latest or self._last, None

    def _stepped(self, optimizer: Optimizer) -> None:
        if self._last is not None and self._last() is optimizer:
            self._latest = self._last
            push = self._push()
            if self._is_due and self._thread == threading.get_ident() and push is not None:
                self._is_due = False
                push()
        elif self._concerns(optimizer):
            self._latest = weakref.ref(optimizer)

    def _concerns(self, optimizer: Optimizer) -> bool:
        own = {id(parameter) for parameter in self._model.parameters()}
        return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
