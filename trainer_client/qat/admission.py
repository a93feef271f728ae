"""What a model must be before it is captured at all, and the module inside the wrappers around it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from npu_wire.errors import InvalidInput, UnsupportedModel


def admitted(model: Any) -> nn.Module:
    """The module to capture: the given one, or the one that `torch.compile` or a data parallel wrapper holds.

    Parameters are shared with the wrapper, so an optimizer may have been built with either.

    Raises:
        InvalidInput: no module, parameters that are not float32, or tensors without values.
        UnsupportedModel: TorchScript.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"model is a {type(model).__name__}, expected a torch.nn.Module; "
            "make what it computes the forward of one"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        return admitted(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return admitted(model.module)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModel(
            f"{type(model).__name__} is TorchScript, which has no Python left to capture; give prepare() the "
            "module that was scripted or traced"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise InvalidInput(
                f"{name!r} has no shape yet; run the model once, `model(example_inputs)`, before prepare()"
            )
        _require_values(tensor, repr(name), "load the weights on a real device before prepare()")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise InvalidInput(
                f"parameter {name!r} is {parameter.dtype}, expected torch.float32; "
                "convert the model with .float()"
            )
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and buffer.itemsize < 4:
            raise InvalidInput(
                f"buffer {name!r} is {buffer.dtype}, expected torch.float32; convert the model with .float()"
            )
    return model


def require_one_device(model: nn.Module, examples: Iterable[Tensor]) -> None:
    """Checks that all tensors of the example and all of the model are on the same device.

    Raises:
        InvalidInput: names the tensors that are apart.
    """
    for example in examples:
        _require_values(example, "example_inputs", "give a real batch")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.device != example.device:
                raise InvalidInput(
                    f"{name!r} is on {tensor.device} and example_inputs on {example.device}; "
                    f"bring both to one device: example_inputs.to({str(tensor.device)!r}), "
                    f"or model.to({str(example.device)!r})"
                )


def _require_values(tensor: Tensor, name: str, remedy: str) -> None:
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise InvalidInput(f"{name} is a tensor without values (meta or fake device); {remedy}")
