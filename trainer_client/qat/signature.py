"""How a model is called: its arguments, whatever containers they come in, as a flat row of leaves.

The row is that of `torch.export`: the tensors of positional and keyword arguments, through every container
that PyTorch's pytrees know, and between them what is no tensor and therefore a constant of the capture.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npu_wire.errors import InvalidInput

_PROBES = 2


@dataclass(frozen=True)
class Leaf:
    """One leaf of the arguments.

    Attributes:
        what: where it stands, for messages: "x", "batch['ids']".
        constant: its value where it is no tensor.
        dtype: of a tensor; None: it is none.
        shape: of a tensor, without the batch dimension where it has one.
        batched: whether the tensor begins with the batch dimension.
    """

    what: str
    constant: Any = None
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    batched: bool = False


@dataclass(frozen=True)
class Call:
    """Checked arguments.

    Attributes:
        leaves: tensors and constants, in the order of the training graph's placeholders.
        samples: size of the batch.
        device: of the first tensor.
    """

    leaves: tuple[Any, ...]
    samples: int
    device: torch.device

    def on(self, device: torch.device) -> "Call":
        """The same on another device, without a gradient."""
        moved = (x.detach().to(device) if isinstance(x, Tensor) else x for x in self.leaves)
        return replace(self, leaves=tuple(moved), device=device)


class Signature:
    """The arguments that a model was captured with.

    Args:
        model: the model.
        args: positional arguments of an example.
        kwargs: keyword arguments of the example.

    Attributes:
        leaves: what the arguments hold, in the order of the training graph's placeholders.

    Raises:
        InvalidInput: arguments that the forward does not take, a tensor that cannot be an input, or a batch
            dimension that the example does not tell.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._name = type(model).__name__
        self._parameters = inspect.signature(model.forward)
        self._example = self._bound(args, kwargs)
        paths, self._structure = pytree.tree_flatten_with_path((self._example.args, self._example.kwargs))
        tensors = [value for _, value in paths if isinstance(value, Tensor)]
        if not tensors:
            raise InvalidInput("example_inputs holds no tensor; give one batch as the model takes it")
        names = [*self._example.arguments][: len(self._example.args)]
        words = [_words(path, names) for path, _ in paths]
        size = self._batch_size(model, [value for _, value in paths], words)
        self.leaves = tuple(_leaf(what, value, size) for what, (_, value) in zip(words, paths, strict=True))

    def probes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example with two samples: `torch.export` takes a batch of one for a constant."""
        return self._resized(lambda leaf, value: leaf.batched, _PROBES)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str = "the input") -> Call:
        """Checks a call's arguments.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            what: how a message calls the call.

        Raises:
            InvalidInput: other arguments, dtypes, shapes or constants than captured.
        """
        bound = self._bound(args, kwargs)
        try:
            leaves = self._structure.flatten_up_to((bound.args, bound.kwargs))
        except ValueError:
            raise InvalidInput(
                f"{what} holds the arguments {_named(bound)}; {self._name} was captured with "
                f"{_named(self._example)}, nested as in example_inputs. Call prepare() again to change that"
            ) from None
        samples, device = 0, None
        for leaf, value in zip(self.leaves, leaves, strict=True):
            where = what if sum(x.dtype is not None for x in self.leaves) == 1 else f"{what} {leaf.what!r}"
            _check(leaf, value, where, samples)
            if leaf.batched:
                samples = len(value)
            if device is None and isinstance(value, Tensor):
                device = value.device
        assert device is not None
        return Call(tuple(leaves), samples, device)

    def flatten_batch(self, batch: Any, what: str) -> Call:
        """Takes what a loader yields: a tensor, a tuple of arguments and more, or a dict of keywords.

        Items of a tuple are the arguments that hold tensors, in their order; what follows (labels that the
        model does not take) is dropped, and so are keys that are none of the captured arguments. Arguments
        that hold no tensor are those of the capture.

        Raises:
            InvalidInput: as `flatten`; or it is none of these.
        """
        known = self._example.arguments
        wanted = [name for name, value in known.items() if _holds_tensor(value)]
        if isinstance(batch, Mapping):
            nested: Mapping[str, Any] = next(
                (known[n] for n, k in self._kinds() if n in known and k is k.VAR_KEYWORD), {}
            )
            given = {key: batch[key] for key in batch if key in known or key in nested}
        else:
            items = (batch,) if isinstance(batch, Tensor) else batch
            if not isinstance(items, tuple | list) or not items or not _holds_tensor(items[0]):
                raise InvalidInput(
                    f"{what} is a {type(batch).__name__}; give tensors, tuples that begin with the model's "
                    "inputs, or dicts of its keywords"
                )
            if self._variable("VAR_POSITIONAL") is not None:
                return self.flatten(tuple(items[: len(self._example.args)]), {}, what)
            given = dict(zip(wanted, items, strict=False))
        constants = {
            name: value
            for name, kind in self._kinds()
            if (value := known.get(name)) is not None and name not in wanted and kind is not kind.VAR_KEYWORD
        }
        return self.flatten((), constants | given, what)

    def _variable(self, kind: str) -> Any:
        """The captured value of the argument of that kind (*args or **kwargs); None: there is none."""
        names = (name for name, own in self._kinds() if own.name == kind)
        return next((self._example.arguments.get(name) for name in names), None)

    def _kinds(self) -> list[tuple[str, Any]]:
        return [(name, parameter.kind) for name, parameter in self._parameters.parameters.items()]

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """One form for all ways to say the same: by position or by keyword, a default spelled out or not."""
        try:
            bound = self._parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidInput(
                f"{self._name}.forward{self._parameters} does not take these arguments: {error}"
            ) from None
        for name, kind in self._kinds():
            value = bound.arguments.get(name)
            if value is self._parameters.parameters[name].default:
                bound.arguments.pop(name, None)
            elif kind is kind.VAR_KEYWORD and value:
                bound.arguments[name] = dict(sorted(value.items()))
        return bound

    def _batch_size(self, model: nn.Module, leaves: list[Any], words: list[str]) -> int:
        """First size of the tensors that begin with the batch dimension."""
        sizes = {
            w: x.shape[0] for w, x in zip(words, leaves, strict=True) if isinstance(x, Tensor) and x.ndim
        }
        candidates = list(dict.fromkeys(sizes.values()))
        if len(candidates) > 1:
            fitting = [size for size in candidates if size and self._runs(model, size)]
            candidates = fitting or candidates
        if len(candidates) != 1:
            told = ", ".join(f"{word!r} with {size}" for word, size in sizes.items()) or "none with a size"
            raise InvalidInput(
                f"which dimension is the batch cannot be told from example_inputs: the tensors begin {told}. "
                "Every input with a batch must begin with it; give an example of a number of samples that no "
                "input without a batch begins with, or make those buffers of the model"
            )
        if not candidates[0]:
            raise InvalidInput("example_inputs holds no sample; give at least one sample")
        return candidates[0]

    def _runs(self, model: nn.Module, size: int) -> bool:
        """Whether the model takes other numbers of samples in place of this first size."""
        for samples in (_PROBES, _PROBES + 1):
            args, kwargs = self._resized(partial(_begins_with, size), samples)
            try:
                with torch.no_grad():
                    model(*args, **kwargs)
            except Exception:  # what a model has against a batch may be anything
                return False
        return True

    def _resized(
        self, batched: Callable[[Any, Tensor], bool], samples: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example with its first sample repeated."""
        values, _ = pytree.tree_flatten((self._example.args, self._example.kwargs))
        leaves: Sequence[Any] = getattr(self, "leaves", [None] * len(values))
        resized = [
            torch.cat([value[:1]] * samples).detach()
            if isinstance(value, Tensor) and batched(leaf, value)
            else value
            for leaf, value in zip(leaves, values, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(resized, self._structure)
        return args, kwargs


def _begins_with(size: int, _: Any, tensor: Tensor) -> bool:
    return tensor.ndim > 0 and len(tensor) == size


def _leaf(what: str, value: Any, size: int) -> Leaf:
    if not isinstance(value, Tensor):
        return Leaf(what, value)
    if value.is_floating_point() and value.dtype != torch.float32:
        raise InvalidInput(
            f"example_inputs: {what!r} is {value.dtype}, expected torch.float32; convert it with .float()"
        )
    batched = value.ndim > 0 and value.shape[0] == size
    return Leaf(what, None, value.dtype, tuple(value.shape[batched:]), batched)


def _check(leaf: Leaf, value: Any, where: str, samples: int) -> None:
    if leaf.dtype is None:
        if type(value) is not type(leaf.constant) or value != leaf.constant:
            raise InvalidInput(
                f"{where} is {_shown(value)}; the model was captured with {leaf.constant!r} there, which is "
                "a part of the captured network. Call prepare() again for another value"
            )
        return
    shape = ("batch", *leaf.shape) if leaf.batched else leaf.shape
    expected = f"expected {leaf.dtype} of shape ({', '.join(map(str, shape))})"
    if not isinstance(value, Tensor):
        raise InvalidInput(f"{where} is {_shown(value)}, {expected}; call prepare() again for other inputs")
    rest = tuple(value.shape[1:]) if leaf.batched else tuple(value.shape)
    if value.dtype != leaf.dtype or rest != leaf.shape or (leaf.batched and not (value.ndim and len(value))):
        raise InvalidInput(
            f"{where} is {value.dtype} of shape {tuple(value.shape)}, {expected}; "
            "call prepare() again for another input shape"
        )
    if leaf.batched and samples and len(value) != samples:
        raise InvalidInput(
            f"{where} holds {len(value)} samples and an input before it {samples}. If it has no batch "
            "dimension, call prepare() with an example of a number of samples that it does not begin with"
        )


def _shown(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else f"a {type(value)}"


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _named(bound: inspect.BoundArguments) -> str:
    return ", ".join(bound.arguments) or "nothing"


def _words(path: tuple[Any, ...], names: list[str]) -> str:
    """A leaf's place: the argument's name, then how to get to it from there."""
    first, second, *rest = path
    index = getattr(second, "idx", None)
    if first.idx == 0 and index is not None:
        name = names[min(index, len(names) - 1)]
    else:
        name = str(getattr(second, "key", second))
    return f"{name}{pytree.keystr(tuple(rest))}"
