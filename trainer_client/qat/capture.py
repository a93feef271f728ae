"""Capture of a user's model: one ONNX graph for the NPU and one FX graph for training, joined by value names.

`torch.onnx.export` decomposes the exported program before it translates it, and hands the decomposed program
back.
Taking that very program as the training graph gives the join for free: the name of an FX node is the name of
the ONNX value, and the name of a parameter is the name of the ONNX initializer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx
import onnxscript  # noqa: F401  # torch.onnx imports it late: where it is missing, that is told now
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from npu_wire.errors import InvalidInput, NpuError
from trainer_client.qat.admission import admitted, require_one_device
from trainer_client.qat.attention import write_out_attention
from trainer_client.qat.complex_pairs import write_out_complex
from trainer_client.qat.exporting import exported, know_dataclasses, promote_subtrahends, quiet_exporters
from trainer_client.qat.fold import VALUE_NAME, value_name
from trainer_client.qat.liveness import freeze_buffers, warn_of_frozen
from trainer_client.qat.pooling import write_out_pools
from trainer_client.qat.refusal import refusal, require_determinism
from trainer_client.qat.signature import Signature
from trainer_client.qat.strides import forget_strides, pool_without_strides, view_by_value
from trainer_client.qat.writes import differentiate_writes, spell_out_writes
from trainer_client.qat.writing_out import write_out_operators

OPSET_VERSION = 20


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        model: the user's own module; its parameters and buffers are what the graph computes with.
        onnx: the float model for the NPU, with the weights of the moment of capture.
        graph: the training graph, in evaluation mode (frozen batch norm, no dropout), batch dimension free.
        initializers: names of the parameters and buffers of `model` that are initializers in `onnx`.
        signature: how the model is called.
        inputs: name of each input value -> its position among the signature's leaves, the placeholders.
        outputs: how the flat outputs of the graph make up what the model returns.
        constant_outputs: those that are no tensors, by position; the graph has None there.
    """

    model: nn.Module
    onnx: bytes
    graph: fx.GraphModule
    initializers: tuple[str, ...]
    signature: Signature
    inputs: Mapping[str, int]
    outputs: pytree.TreeSpec
    constant_outputs: Mapping[int, Any]

    @cached_property
    def _owners(self) -> tuple[dict[str, nn.Module], ...]:
        """Modules by path, first the user's model's, then the graph's: to look each up takes milliseconds."""
        roots = (self.model, self.graph)
        return tuple(dict(root.named_modules(remove_duplicate=False)) for root in roots)

    @property
    def modules(self) -> dict[str, str]:
        """Path of the user's module that computes a value, by ONNX value name; "" is the model itself."""
        stacks = {value_name(node): node.meta.get("nn_module_stack") for node in self.graph.graph.nodes}
        return {value: list(stack.values())[-1][0] for value, stack in stacks.items() if stack}

    def returned(self, outputs: Sequence[Any]) -> Any:
        """What the model returns, from the graph's flat outputs."""
        leaves = [self.constant_outputs.get(i, output) for i, output in enumerate(outputs)]
        return pytree.tree_unflatten(leaves, self.outputs)

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer `name` as the model holds it now, or the captured constant of that name.

        Read live: `load_state_dict(..., assign=True)` and a plain assignment replace the object in the model.
        """
        owner_name, _, attribute = name.rpartition(".")
        for owners in self._owners:
            value = getattr(owners.get(owner_name), attribute, None)
            if isinstance(value, Tensor):
                return value
        raise InvalidInput(
            f"the model has no parameter or buffer {name!r} any more; "
            "call prepare() again after changing its modules"
        )


Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One batch: the model's one tensor, its positional arguments, or its keyword arguments."""


def capture(
    model: nn.Module, example_inputs: Example, example_kwargs: Mapping[str, Any] | None = None
) -> Captured:
    """Captures a model with whatever arguments and return value `torch.export` knows.

    The capture is of the model in evaluation mode: batch norm uses its running statistics and dropout does
    nothing, as on the NPU. The training flags of all submodules are left as they were.

    Args:
        model: the model; float32 parameters, on any device.
        example_inputs: one batch on the model's device, n >= 1 samples: a tensor, a tuple of positional
            arguments or a dict of keyword arguments. Tensors of one first size have the batch dimension.
        example_kwargs: keyword arguments beside positional ones.

    Raises:
        InvalidInput: see `Signature`; several devices, or a model that cannot run on the example.
        UnsupportedModel: `torch.export` or the ONNX exporter cannot capture the model; the message says what,
            where, and what to do.
    """
    model = admitted(model)
    args, kwargs = _arguments(example_inputs, example_kwargs)
    require_one_device(model, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
    with _evaluation_mode(model), quiet_exporters():
        signature = Signature(model, args, kwargs)
        probes, keywords = signature.probes()
        try:
            stage = "torch.export"
            know_dataclasses(model, probes, keywords)
            shapes = _dynamic_shapes(signature, probes, keywords)
            model.train()  # drops what the probes have left in a model that keeps values in evaluation
            model.eval()
            program = write_out_complex(exported(model, probes, keywords, shapes))
            write_out_operators(program)
            write_out_attention(program)
            write_out_pools(program)
            pool_without_strides(program)
            view_by_value(program)
            spell_out_writes(program)
            promote_subtrahends(program)
            constants = _take_constants(program)
            stage = "the ONNX exporter"
            translated = torch.onnx.export(
                program, dynamo=True, optimize=False, opset_version=OPSET_VERSION, verbose=False
            )
        except NpuError:
            raise
        except Exception as error:
            raise refusal(model, lambda: model(*args, **kwargs), stage, error) from error
        assert translated is not None
        assert translated.exported_program is not None
        graph = translated.exported_program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    require_determinism(model, graph)
    forget_strides(graph)
    differentiate_writes(graph)
    warn_of_frozen(model, freeze_buffers(graph))
    proto = translated.model_proto
    placeholders = graph.graph.find_nodes(op="placeholder")
    tensors = [i for i, leaf in enumerate(signature.leaves) if leaf.dtype is not None]
    inputs = {}
    for value, position in zip(proto.graph.input, tensors, strict=True):
        # FX renames an input that is called like a Python builtin, ONNX does not.
        placeholders[position].meta[VALUE_NAME] = value.name
        inputs[value.name] = position
    structure = translated.exported_program.call_spec.out_spec
    assert structure is not None
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
        signature=signature,
        inputs=inputs,
        outputs=structure,
        constant_outputs=constants,
    )


def _arguments(inputs: Example, keywords: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {**inputs, **(keywords or {})}
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), dict(keywords or {})


def _dynamic_shapes(
    signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ShapesCollection:
    """The batch dimension of every input that has one."""
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf, value in zip(signature.leaves, pytree.tree_leaves((args, kwargs)), strict=True):
        if leaf.batched:
            shapes[value] = {0: torch.export.Dim.DYNAMIC}
    return shapes


def _take_constants(program: torch.export.ExportedProgram) -> dict[int, Any]:
    """Takes what is no tensor out of a program's outputs: the ONNX exporter knows only None there."""
    (node,) = program.graph.find_nodes(op="output")
    specs = program.graph_signature.output_specs
    outputs, constants = list(node.args[0]), {}
    first = sum(spec.kind is not OutputKind.USER_OUTPUT for spec in specs)  # written buffers come first
    for i, value in enumerate(outputs):
        if value is not None and not isinstance(value, fx.Node):
            constants[i - first] = value
            outputs[i], specs[i].arg = None, ConstantArgument(name="", value=None)
    node.args = (tuple(outputs),)
    program.graph_module.recompile()
    return constants


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every submodule has its own flag and buffers again.

    The model runs on the example within, and a forward may write to buffers. Going through `train()` lets a
    model drop what it keeps in evaluation (LeViT its attention biases): tensors of the trace by now.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, flag in flags:
            module.training = flag
        for module, name, buffer, version, before in buffers:
            module._buffers[name] = buffer
            if buffer._version != version:
                buffer.detach().copy_(before)
