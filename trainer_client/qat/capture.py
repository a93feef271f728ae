"""Capture of a user's model: one ONNX graph for the NPU and one FX graph for training, joined by value names.

`torch.onnx.export` decomposes the exported program before it translates it, and hands the decomposed program
back.
Taking that very program as the training graph gives the join for free: the name of an FX node is the name of
the ONNX value, and the name of a parameter is the name of the ONNX initializer.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, fx, nn

from npu_wire.errors import InvalidInput, UnsupportedModel
from trainer_client.qat.attention import write_out_attention
from trainer_client.qat.fold import VALUE_NAME, value_name

OPSET_VERSION = 20
_EXPORTER_LOGGER = "torch.onnx._internal.exporter._registration"


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        model: the user's own module; its parameters and buffers are what the graph computes with.
        onnx: the float model for the NPU, with the weights of the moment of capture.
        graph: the training graph, in evaluation mode (frozen batch norm, no dropout), batch dimension free.
        initializers: names of the parameters and buffers of `model` that are initializers in `onnx`.
        input_name: name of the input value.
        input_shape: shape of the input without the batch dimension.
        output_shape: shape of the output without the batch dimension.
    """

    model: nn.Module
    onnx: bytes
    graph: fx.GraphModule
    initializers: tuple[str, ...]
    input_name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def modules(self) -> dict[str, str]:
        """Path of the user's module that computes a value, by ONNX value name; "" is the model itself."""
        stacks = {value_name(node): node.meta.get("nn_module_stack") for node in self.graph.graph.nodes}
        return {value: list(stack.values())[-1][0] for value, stack in stacks.items() if stack}

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer `name` as the model holds it now, or the captured constant of that name.

        Read live: `load_state_dict(..., assign=True)` and a plain assignment replace the object in the model.
        """
        for root in (self.model, self.graph):
            owner_name, _, attribute = name.rpartition(".")
            try:
                value = getattr(root.get_submodule(owner_name), attribute)
            except AttributeError:
                continue
            if isinstance(value, Tensor):
                return value
        raise InvalidInput(
            f"the model has no parameter or buffer {name!r} any more; "
            "call prepare() again after changing its modules"
        )


def capture(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Captured:
    """Captures a model that maps one float32 tensor to one float32 tensor.

    The capture is of the model in evaluation mode: batch norm uses its running statistics and dropout does
    nothing, as on the NPU. The training flags of all submodules are left as they were.

    Args:
        model: the model; float32 parameters, on any device.
        example_inputs: one batch, float32, shape (n, ...), n >= 1, on the model's device; a tensor or a
            1-tuple.

    Raises:
        InvalidInput: several inputs or outputs, or dtypes other than float32.
        UnsupportedModel: `torch.export` or the ONNX exporter cannot capture the model; the message holds the
            reason.
    """
    example = _single_input(example_inputs)
    _require_float32(model)
    # torch.export takes a batch of 1 for a constant, so the batch that it sees has two samples.
    example = torch.cat([example[:1], example[:1]])
    with _evaluation_mode(model), _quiet_exporter():
        output_shape = _output_shape(model, example)
        try:
            exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            write_out_attention(exported)
        except Exception as error:
            raise UnsupportedModel(_capture_failure(model, "torch.export", error)) from error
        try:
            program = torch.onnx.export(
                exported, dynamo=True, optimize=False, opset_version=OPSET_VERSION, verbose=False
            )
        except Exception as error:
            raise UnsupportedModel(_capture_failure(model, "the ONNX exporter", error)) from error
        assert program is not None
        assert program.exported_program is not None
        graph = program.exported_program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    proto = program.model_proto
    for node in graph.graph.nodes:
        if (
            node.op == "placeholder"
        ):  # FX renames an input that is called like a Python builtin, ONNX does not
            node.meta[VALUE_NAME] = proto.graph.input[0].name
    owned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    owned |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return Captured(
        model=model,
        onnx=proto.SerializeToString(),
        graph=graph,
        initializers=tuple(
            tensor.name
            for tensor in proto.graph.initializer
            if tensor.name in owned and tensor.data_type == onnx.TensorProto.FLOAT
        ),
        input_name=proto.graph.input[0].name,
        input_shape=tuple(example.shape[1:]),
        output_shape=output_shape,
    )


def _single_input(example_inputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise InvalidInput(
            f"example_inputs holds {len(inputs)} values; a model with exactly one tensor as its input "
            "is supported. Wrap the model in a module that takes one tensor."
        )
    example = inputs[0]
    if example.dtype != torch.float32:
        raise InvalidInput(
            f"example_inputs is {example.dtype}, expected torch.float32; convert it with .float()"
        )
    if example.ndim < 2 or example.shape[0] < 1:
        raise InvalidInput(
            f"example_inputs has shape {tuple(example.shape)}, expected (batch, ...) with at least one sample"
        )
    return example.detach()


def _require_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise InvalidInput(
                f"parameter {name!r} is {parameter.dtype}, expected torch.float32; "
                "convert the model with .float()"
            )


def _output_shape(model: nn.Module, example: Tensor) -> tuple[int, ...]:
    """Shape of the output without the batch dimension, for a model that returns one float32 tensor."""
    with torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor):
        raise InvalidInput(
            f"the model returns a {type(output).__name__}; exactly one tensor as its output is supported. "
            "Wrap the model in a module that returns one tensor."
        )
    if output.dtype != torch.float32 or output.ndim < 1 or output.shape[0] != example.shape[0]:
        raise InvalidInput(
            f"the model returns {output.dtype} of shape {tuple(output.shape)} for a batch of "
            f"{example.shape[0]}; expected torch.float32 with the batch as its first dimension"
        )
    return tuple(output.shape[1:])


def _capture_failure(model: nn.Module, stage: str, error: Exception) -> str:
    reason = str(error).strip() or type(error).__name__
    return (
        f"{stage} cannot capture {type(model).__name__}: {reason}\n"
        "The forward must be traceable for any batch size: no control flow on tensor values, no fixed batch "
        "dimension."
    )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every submodule has its own flag again."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences what the exporter says about torchvision's operators and its own deprecations."""
    logger = logging.getLogger(_EXPORTER_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
