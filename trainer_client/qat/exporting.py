"""`torch.export`, asked in such a way that most models pass."""

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from trainer_client.qat.calls import call
from trainer_client.qat.refusal import tells_line, wants_one_batch_size

_TALKATIVE = ("torch.onnx._internal.exporter._registration", "torch.export._trace", "torch._guards")


def exported(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: torch.export.ShapesCollection,
) -> ExportedProgram:
    """The model as `torch.export` sees it, for any size of batch.

    It first runs the forward with symbols for sizes. `len(x)` ends that: Python makes a plain number of it.
    The second attempt is strict, and reads the forward's bytecode, where `len(x)` is a size like any other;
    it knows less of Python otherwise.

    Args:
        model: in evaluation mode.
        args: positional arguments of the example.
        kwargs: keyword arguments of the example.
        dynamic_shapes: the tensors among them that have a batch dimension.

    Raises:
        Exception: whatever PyTorch raises, of the attempt that tells where in the model.
    """
    model = _with_named_keywords(model, kwargs)
    shapes = dynamic_shapes.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    try:
        with _Sizes():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        if not wants_one_batch_size(error):
            raise
        try:
            with _Sizes():
                return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=True)
        except Exception as strict:  # what a tracer has against a model may be anything
            raise (strict if tells_line(strict) else error) from None


class _Sizes(TorchFunctionMode):
    """Takes along a dimension by `gather`: PyTorch's own way compares sizes as plain numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.take_along_dim or func is Tensor.take_along_dim:
            found = _gathered(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        return func(*args, **kwargs)


def _gathered(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor | None:
    """`take_along_dim` of equal ranks, sizes of 1 broadcast; None: flattened, which is another function."""
    if dim is None or input.ndim != indices.ndim:
        return None
    own = dim % input.ndim
    sizes = [-1 if d == own or n != 1 else indices.shape[d] for d, n in enumerate(input.shape)]
    other = [-1 if d == own or n != 1 else input.shape[d] for d, n in enumerate(indices.shape)]
    return torch.gather(input.expand(sizes), own, indices.expand(other))


def promote_subtrahends(program: ExportedProgram) -> None:
    """Makes what a float minus an integer tensor subtracts a float, in place.

    The exporter's own promotion does not know that form.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.rsub.Scalar):
        source, wanted = node.args[0], node.meta["val"].dtype
        if source.meta["val"].dtype != wanted:
            with graph.inserting_before(node):
                cast = call(graph, source, torch.ops.aten.to.dtype, source, wanted)
            node.replace_input_with(source, cast)
    program.graph_module.recompile()


def _with_named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    """The same module, its attributes included, but for a signature that names what `**kwargs` takes.

    `torch.export` counts dynamic keywords twice where the signature does not name them.
    """
    signature = inspect.signature(model.forward)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    new = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in signature.parameters
    ]
    if not new:
        return model

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(model).forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *kept, *new])  # type: ignore[attr-defined]
    named = type(type(model).__name__, (type(model),), {"forward": forward})
    twin: nn.Module = object.__new__(named)
    twin.__dict__ = model.__dict__
    return twin


def know_dataclasses(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tells PyTorch's pytrees of the dataclasses that the model takes and returns."""
    with torch.no_grad():
        waiting = [args, kwargs, model(*args, **kwargs)]
    while waiting:
        for leaf in pytree.tree_leaves(waiting.pop()):
            if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
                torch.export.register_dataclass(type(leaf))
                waiting.append(leaf)


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences what the exporters say to their developers: of operators, of deprecations, of what failed.

    What failed is raised as well, and told in the user's words; a whole graph goes to stderr beside it.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
