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
import onnxscript  # noqa: F401  # torch.onnx imports it late: where it is missing, that is told now
import torch
from torch import Tensor, fx, nn

from npu_wire.errors import InvalidInput, NpuError
from trainer_client.qat.admission import admitted, require_one_device
from trainer_client.qat.attention import write_out_attention
from trainer_client.qat.fold import VALUE_NAME, value_name
from trainer_client.qat.liveness import freeze_buffers, warn_of_frozen
from trainer_client.qat.refusal import refusal, require_determinism
from trainer_client.qat.strides import forget_strides, pool_without_strides

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
        InvalidInput: several inputs or outputs, dtypes other than float32, several devices, or a model that
            cannot run on the example.
        UnsupportedModel: `torch.export` or the ONNX exporter cannot capture the model; the message says what,
            where, and what to do.
    """
    model = admitted(model)
    given = _single_input(example_inputs)
    require_one_device(model, given)
    # torch.export takes a batch of 1 for a constant, so the batch that it sees has two samples.
    example = torch.cat([given[:1], given[:1]])
    with _evaluation_mode(model), _quiet_exporter():
        try:
            stage = "torch.export"
            exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            output_shape = _output_shape(model, exported)
            write_out_attention(exported)
            pool_without_strides(exported)
            stage = "the ONNX exporter"
            program = torch.onnx.export(
                exported, dynamo=True, optimize=False, opset_version=OPSET_VERSION, verbose=False
            )
        except NpuError:
            raise
        except Exception as error:
            raise refusal(model, lambda: model(given), stage, error) from error
        assert program is not None
        assert program.exported_program is not None
        graph = program.exported_program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    require_determinism(model, graph)
    forget_strides(graph)
    warn_of_frozen(model, freeze_buffers(graph))
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


def _output_shape(model: nn.Module, program: torch.export.ExportedProgram) -> tuple[int, ...]:
    """Shape of the output without the batch dimension, for a model that returns one float32 tensor."""
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, tuple | list)
    structure = program.call_spec.out_spec
    output = outputs[-1].meta.get("val") if outputs and isinstance(outputs[-1], fx.Node) else None
    if structure is None or not structure.is_leaf() or not isinstance(output, Tensor):
        returned = "no tensor" if structure is None or structure.is_leaf() else f"a {structure.type.__name__}"
        raise InvalidInput(
            f"{type(model).__name__} returns {returned}; exactly one tensor as its output is supported. "
            "Wrap the model in a module that returns one tensor."
        )
    # The batch is a dimension without a size of its own: a fixed one that happens to be the example's is not.
    if output.dtype != torch.float32 or output.ndim < 1 or isinstance(output.shape[0], int):
        raise InvalidInput(
            f"{type(model).__name__} returns {output.dtype} of shape {tuple(output.shape)}; expected "
            "torch.float32 with the batch as its first dimension. Wrap the model in a module that returns it."
        )
    return tuple(output.shape[1:])


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
