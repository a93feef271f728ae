"""What of a user's module lives on in the loop, and what was frozen when it was captured.

Parameters and buffers are read live. The code of `forward`, hooks on inner modules included, ran once: what
it computes on tensors is in the graph, whatever else it did is not.
"""

import warnings

import torch
from torch import fx, nn

from npu_wire.errors import InvalidInput

_COPY = torch.ops.aten.copy_.default
_OF_PYTORCH = (
    "torch."  # the old weight_norm, spectral_norm and pruning are hooks that compute weights: in the graph
)


def freeze_buffers(graph: fx.GraphModule) -> tuple[str, ...]:
    """Takes out of a training graph what writes to buffers; returns their names.

    The NPU holds them as constants. Written in training and not in evaluation, they would make two networks.
    """
    frozen = []
    for node in graph.graph.find_nodes(op="call_function", target=_COPY):
        target = node.args[0]
        if target.op == "get_attr" and not node.users:
            frozen.append(str(target.target))
            graph.graph.erase_node(node)
    graph.recompile()
    return tuple(frozen)


def warn_of_frozen(model: nn.Module, buffers: tuple[str, ...]) -> None:
    """Says which hooks will not be called, and which buffers will not be written, if any."""
    if buffers:
        warnings.warn(
            f"the forward of {type(model).__name__} writes to the buffers {', '.join(buffers)}; in the loop "
            "they stay as they are, like batch norm's statistics, until you change them yourself",
            stacklevel=4,
        )
    hooked = [path or type(model).__name__ for path, module in model.named_modules() if _hooks(module)]
    if hooked:
        warnings.warn(
            f"hooks on {', '.join(hooked)} were captured with the forward: what they compute on tensors is "
            "part of the network, and they are not called in the loop. Register what shall be called on the "
            "module that prepare() returns",
            stacklevel=4,
        )


class Structure:
    """The modules of a model at the moment of capture."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._hooks = sum(map(_hooks, self._modules.values()))
        self._warned = False

    def require_unchanged(self) -> None:
        """Checks that the graph is still the model's.

        Raises:
            InvalidInput: names the modules that were added, replaced or removed; says what to do.
        """
        now = dict(self._model.named_modules(remove_duplicate=False))
        if now.keys() != self._modules.keys() or any(now[path] is not m for path, m in self._modules.items()):
            changed = [
                path for path in {**now, **self._modules} if now.get(path) is not self._modules.get(path)
            ]
            raise InvalidInput(
                f"the model has changed since prepare(): {', '.join(changed)}. The NPU computes what was "
                "captured then; call prepare() again"
            )
        if not self._warned and sum(map(_hooks, now.values())) > self._hooks:
            self._warned = True
            warnings.warn(
                "hooks were registered inside the model after prepare(); they are not called in the loop. "
                "Register them before it, or on the module that prepare() returns",
                stacklevel=4,
            )


def _hooks(module: nn.Module) -> int:
    """Number of a module's hooks that are not PyTorch's own."""
    kinds = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return sum(
        not (getattr(hook, "__module__", None) or type(hook).__module__).startswith(_OF_PYTORCH)
        for kind in kinds
        for hook in kind.values()
    )
