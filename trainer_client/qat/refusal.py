"""Why a model cannot be captured: what, where in the user's model, and what to do about it.

PyTorch's exporters explain themselves to people who develop exporters. What they raise is translated here by
`_REASONS`, and the place is read from the traceback: it leads through the forward of the user's own modules.
"""

import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from npu_wire.errors import InvalidInput, NpuError, UnsupportedModel

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_LONGEST = 300

_ONE_BATCH_SIZE = r"Constraints violated|specialized it to be a constant|is invalid for input of size"

# What the exporters' errors say, what that means, and the remedy. The first that fits counts.
_REASONS = (
    (
        r"GuardOnDataDependent|data-dependent (expression|guard|operator)|DynamicOutputShape"
        r"|Could not (guard|extract)|_local_scalar_dense|unbacked|PendingUnbackedSymbol",
        "the forward decides by the value of a tensor (if, while, int(), .item(), nonzero)",
        "Let every sample take the same path: torch.where(condition, a, b) in place of `if`, tensors in "
        "place of Python numbers, a fixed number of results",
    ),
    (
        _ONE_BATCH_SIZE,
        "the forward works for one size of batch only",
        "Take the size from the input (x.shape[0], or -1 in reshape), and neither loop over the batch nor "
        "keep tensors with as many rows as the batch",
    ),
    (
        r"\.numpy\(\) is not supported|can't convert .* to numpy|to_numpy|__array__",
        "the forward, or a hook, leaves PyTorch for NumPy",
        "Compute with torch operations, and remove the hook before prepare()",
    ),
    (
        r"No ONNX function found for <OpOverload\(op='(?P<operator>[^']+)'",
        "the operator {operator} has no translation to ONNX, in which networks travel to the NPU",
        "Write it with other torch operators, or keep what it computes out of the model. Where it computes "
        "a weight (a parametrization), torch.nn.utils.parametrize.remove_parametrizations makes it plain",
    ),
    (
        r"Unsupported attribute type: .*SymbolicTensor",
        "a constant of an operator, such as a convolution's groups, is computed from the size of the batch",
        "Weights that are mixed for each sample cannot be on an NPU: mix what they compute instead, "
        "sum(w[i] * conv[i](x))",
    ),
    (
        r"Unsupported (input|output|return) type|pytree|not supported as (an )?output|Unknown type",
        "an input or output is of a type that torch.export does not know",
        "Return tensors, in tuples, lists, dicts, or dataclasses that torch.export.register_dataclass knows",
    ),
    (
        r"Inference tensors",
        "its tensors were made under torch.inference_mode(), and cannot be trained",
        "Build and load the model outside of it",
    ),
    (
        r"is not on the expected device|on the same device|different devices|same device",
        "its tensors are on several devices",
        "Bring model and example to one device, with .to(device)",
    ),
    (
        r"expected scalar type|same dtype|dtypes? .*(mismatch|different|match)|must match",
        "its tensors have several dtypes or shapes that do not go together",
        "Convert the whole model, buffers included, with .float()",
    ),
)
_UNKNOWN = (
    "it cannot be traced",
    "The forward must be torch operations on tensors, for any size of batch, without control flow on values",
)


def refusal(model: nn.Module, run: Callable[[], Any], stage: str, error: Exception) -> NpuError:
    """The error for a model that could not be captured.

    Args:
        model: the user's model.
        run: calls the model on the user's own example.
        stage: who could not, such as "torch.export".
        error: what it raised.

    Returns:
        InvalidInput if the model cannot even run on the example, else UnsupportedModel.
    """
    name = type(model).__name__
    alone = _raised(run)
    if alone is not None:
        return InvalidInput(
            f"{name} cannot run on example_inputs, even without an NPU: {_words(alone)}"
            f"{_place(model, alone)}. Make `model.eval()(example_inputs)` work first: shapes, dtypes "
            "and devices must fit the model."
        )
    text = _text(error)
    fitting = ((re.search(pattern, text), what, remedy) for pattern, what, remedy in _REASONS)
    what, remedy = next(
        ((what.format(**found.groupdict()), remedy) for found, what, remedy in fitting if found), _UNKNOWN
    )
    return UnsupportedModel(
        f"{stage} cannot capture {name}: {what}{_place(model, error)}. {remedy}. ({_words(error)})"
    )


def wants_one_batch_size(error: Exception) -> bool:
    """Whether an exporter's error says that the size of the batch became a constant."""
    return re.search(_ONE_BATCH_SIZE, _text(error)) is not None


def tells_line(error: Exception) -> bool:
    """Whether an exporter's error shows, in its text, the line of the user's code that it is about."""
    return _told_line(error) is not None


def require_determinism(model: nn.Module, graph: fx.GraphModule) -> None:
    """Checks that a training graph draws no random numbers: NPU and FP32 layers would draw different ones.

    Raises:
        UnsupportedModel: names operator and module.
    """
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and _draws(node):
            stack = node.meta.get("nn_module_stack")
            path = list(stack.values())[-1][0] if stack else ""
            where = f"the module {path!r}" if path else type(model).__name__
            raise UnsupportedModel(
                f"{where} draws random numbers in evaluation mode ({node.target}); an NPU computes the same "
                "each time. Draw in training mode alone, as torch.nn.Dropout does, or make the numbers an "
                "input"
            )


def _draws(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    switches = [name for name in ("train", "training", "dropout_p") if name in names]
    return all(given.get(name) for name in switches)


def _raised(run: Callable[[], Any]) -> Exception | None:
    try:
        with torch.no_grad():
            run()
    except Exception as error:
        error.__context__ = None  # the exporter's error, which is being handled meanwhile
        return error
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _text(error: BaseException) -> str:
    return "\n".join(f"{type(e).__name__} {e}" for e in _chain(error))


def _words(error: Exception) -> str:
    """The innermost error's own words, in one line of bearable length."""
    innermost = list(_chain(error))[-1]
    lines = str(innermost).strip().splitlines() or [""]
    return f"{type(innermost).__name__}: {lines[0][:_LONGEST]}".rstrip(": ")


def _place(model: nn.Module, error: Exception) -> str:
    """Where in the user's model: the path of the module and the line of the user's code, as far as known."""
    paths = {id(module): path for path, module in model.named_modules()}
    path = line = None
    for link in _chain(error):
        for frame, number in traceback.walk_tb(link.__traceback__):
            owner = frame.f_locals.get("self")
            if id(owner) in paths:
                path = paths[id(owner)]
            node = frame.f_locals.get("node")
            if isinstance(node, fx.Node) and node.meta.get("nn_module_stack"):
                path = list(node.meta["nn_module_stack"].values())[-1][0]
            elif path is not None and _is_users(frame):
                line = f"{frame.f_code.co_filename}:{number}"
    line = line or _told_line(error)
    at = (
        "" if path is None else f", in the module {path!r}" if path else f", in {type(model).__name__} itself"
    )
    return at + (f" ({line})" if line else "")


def _told_line(error: Exception) -> str | None:
    """The innermost line of the user's in the stack that the strict tracer writes into its message."""
    _, _, stack = _text(error).partition("User stack:")
    lines = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return next((f"{file}:{number}" for file, number in reversed(lines) if _is_users_file(file)), None)


def _is_users(frame: FrameType) -> bool:
    return _is_users_file(frame.f_code.co_filename)


def _is_users_file(name: str) -> bool:
    return not name.startswith((_TORCH, _OURS, "<"))
